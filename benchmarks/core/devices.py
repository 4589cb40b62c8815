"""Clocks of a device: the time of a step there, and the time that it takes of the host.

Both devices below have the same methods. `Cpu` is for rehearsals: everything runs, and no time means anything.
"""

import torch

from . import memory, record, timing


class Cuda:
    """Times by events on the current stream."""

    type = "cuda"
    copy_elements = 2**27  # 512 MiB from one place to another: no cache holds any of it

    def describe(self):
        return record.gpu()

    def available_memory(self):
        """Returns free bytes, without the bytes of the copy that measures the memory's speed."""
        return torch.cuda.mem_get_info()[0] - 8 * self.copy_elements

    def block(self, step, steps):
        """Seconds between two events around the steps: of the device or of the host, whichever takes longer."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def host_block(self, step, steps):
        """Seconds until the host has launched the steps. They should be few, as a full queue makes it wait."""
        torch.cuda.synchronize()
        seconds = timing.block(step, steps)
        torch.cuda.synchronize()
        return seconds

    def graph(self, step, steps):
        """Returns a function that replays the steps by one call. The step must have run before; RuntimeError if not."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                for _ in range(steps):
                    step()
        finally:
            torch.cuda.set_stream(stream)  # a capture that failed leaves its own
        return graph.replay

    def kernels(self, step):
        """Names of the kernels that one step launches, and None if the profiler can't say."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        try:
            with torch.profiler.profile(activities=activities) as profile:
                step()
                torch.cuda.synchronize()
            names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        except RuntimeError:
            return None
        # Annotations show up among them. A step launches something: an empty list means that nothing was seen.
        return [name for name in names if "kernel" in name or name.startswith("Mem")] or None

    def release(self):
        """Gives back what a model took."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Cpu:
    """The same on the CPU, without events and graphs."""

    type = "cpu"
    copy_elements = 2**16

    def describe(self):
        return None

    def available_memory(self):
        return memory.available()

    def block(self, step, steps):
        return timing.block(step, steps)

    def host_block(self, step, steps):
        return timing.block(step, steps)

    def graph(self, step, steps):
        def replay():
            for _ in range(steps):
                step()

        return replay

    def kernels(self, step):
        step()
        return None

    def release(self):
        pass


DEVICES = {"cuda": Cuda, "cpu": Cpu}
