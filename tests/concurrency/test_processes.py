"""Forked processes beside a step: they step themselves."""

from tests.support.scripts import run_script


def test_a_forked_child_can_step():
    """As with stock torch: after set_num_threads(1), since OpenMP's threads do not survive a fork."""
    result = run_script("""if True:
        import os, torch, fastclip
        p = torch.zeros(300_000, requires_grad=True)
        opt = fastclip.SGD([p], lr=1.0, momentum=0.9, max_norm=1e9)
        torch.set_num_threads(2)
        p.grad = torch.ones_like(p)
        opt.step()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            opt.step()
            os._exit(0 if torch.allclose(p.detach(), torch.tensor(-2.9)) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert result.stdout == "0\n", result.stderr


def test_data_loader_workers_beside_steps():
    """They are forked between the steps of one thread and in the middle of another's, and step themselves."""
    result = run_script("""if True:
        import threading, torch, fastclip
        from torch.utils.data import DataLoader, Dataset

        SIZE = 300_000

        class StepsInTheWorker(Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                p = torch.zeros(SIZE, requires_grad=True)
                p.grad = torch.full_like(p, float(index))
                fastclip.SGD([p], lr=1.0, momentum=0.9, max_norm=1e9).step()
                assert (p == p[0]).all()
                return p[0].item()

        def train(p, optimizer):
            p.grad = torch.ones_like(p)
            optimizer.step()

        torch.set_num_threads(2)
        # The first call of a function of torch's registers something with glibc's atexit, whose lock a child that is
        # forked meanwhile finds locked for good.
        StepsInTheWorker()[1], torch.Generator()
        params = [torch.zeros(SIZE, requires_grad=True) for _ in range(2)]
        optimizers = [fastclip.SGD([p], lr=1.0, max_norm=1e9) for p in params]
        for p, optimizer in zip(params, optimizers):
            train(p, optimizer)
            p.data.zero_()
        stop, steps, batches = threading.Event(), [0, 0], []

        def train_until_stopped():
            while not stop.is_set():
                train(params[1], optimizers[1])
                steps[1] += 1

        thread = threading.Thread(target=train_until_stopped)
        thread.start()
        for epoch in range(2):
            for batch in DataLoader(StepsInTheWorker(), num_workers=2, multiprocessing_context="fork"):
                train(params[0], optimizers[0])
                steps[0] += 1
                batches.append(batch.item())
        stop.set()
        thread.join()
        print(batches, steps[0], all((p == -n).all().item() for p, n in zip(params, steps)), steps[1] > 0)
    """)
    batches = [0.0, -1.0, -2.0, -3.0] * 2
    assert result.stdout == f"{batches} 8 True True\n", result.stdout + result.stderr
