"""Keeps fastclip's classes out of lists of the optimizers that there are.

jsonargparse, and with it LightningCLI, looks for the class that `--optimizer AdamW` means among all subclasses of
`torch.optim.Optimizer`. A second one of that name, in a module that is only imported, would make it ambiguous, and a
program would fail that works without fastclip. It does not look behind classes that are local to a function.
`--optimizer fastclip.AdamW` finds ours by its path.
"""


def hidden(base: type) -> type:
    """Returns a class between `base` and its subclasses in fastclip, behind which nobody looks."""

    class Hidden(base):  # type: ignore[valid-type, misc]
        pass

    Hidden.__name__ = base.__name__
    return Hidden


def hide(cls: type) -> None:
    """Puts such a class between `cls` and each of its bases in torch."""
    cls.__bases__ = tuple(hidden(base) if base.__module__.startswith("torch.") else base for base in cls.__bases__)
