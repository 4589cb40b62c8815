"""What is aimed at on a GPU, and what a result holds of it. Written down before anything was measured."""

from dataclasses import dataclass

LARGE = "dense-100m"


@dataclass(frozen=True)
class Target:
    """A number of one row of the results: of `model`, with a `clip`, plain SGD."""

    what: str
    key: str  # of the row; a dot goes a level down
    bound: float
    model: str = LARGE
    clip: str = "value"
    dtype: str = "float32"
    at_most: bool = False
    unit: str = ""

    def measured(self, results):
        """The median; None where it is not in the results."""
        for row in results["cases"]:
            asked = (self.model, self.clip, self.dtype, 0)
            if (row["model"], row["clip"], row["dtype"], row["momentum"]) == asked:
                value = row
                for key in self.key.split("."):
                    value = (value or {}).get(key)
                return value["median"] if isinstance(value, dict) else value and len(value)
        return None

    def reached(self, value):
        """None where nothing was measured."""
        if value is None:
            return None
        return value <= self.bound if self.at_most else value >= self.bound


TARGETS = [
    Target("value clip, 100M parameters: of the copy bandwidth", "of_floor", 0.95),
    Target("value clip, 100M parameters: over fused + clip_grad_value_", "device_vs_fused", 2.2, unit="×"),
    Target("norm clip, 100M parameters: of 16 bytes each at the copy bandwidth", "of_floor", 0.93, clip="norm"),
    Target("norm clip, 100M parameters: over fused + clip_grad_norm_", "device_vs_fused", 1.5, clip="norm", unit="×"),
    Target(
        "norm clip over value clip, Conformer-S", "norm_vs_value", 1.15, "conformer-s", "norm", at_most=True, unit="×"
    ),
    Target(
        "norm clip over value clip, Conformer-M", "norm_vs_value", 1.3, "conformer-m", "norm", at_most=True, unit="×"
    ),
    Target("host, Conformer-L, 510 tensors", "host_us.fastclip", 15, "conformer-l", at_most=True, unit=" µs"),
    Target("host, Conformer-L: over the loop", "host_vs_loop", 100, "conformer-l", unit="×"),
    Target("device, the seed's DNN", "device_us.fastclip", 6, "dnn", at_most=True, unit=" µs"),
    Target("launches, the seed's DNN", "kernels", 1, "dnn", at_most=True),
    Target("bf16, value clip, 100M parameters: of the copy bandwidth", "of_floor", 0.9, dtype="bfloat16"),
]


def lines(results):
    """A header and a row for each target, of strings."""
    found = [["aim (plain SGD)", "target", "measured", "reached"]]
    for target in TARGETS:
        value = target.measured(results)
        bound = f"{'≤' if target.at_most else '≥'} {target.bound:g}{target.unit}"
        measured = "not measured" if value is None else f"{value:.3g}{target.unit}"
        reached = None if results["rehearsal"] else target.reached(value)
        found.append([target.what, bound, measured, {None: "", True: "yes", False: "no"}[reached]])
    return found
