"""fastclip.h for Python, by ctypes."""

import ctypes
from pathlib import Path

import torch

import fastclip
from fastclip.plain.rules import RULES

FOLDER = Path(fastclip.__file__).parent
LIBRARY = FOLDER / "libfastclip.so"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of fastclip_dtype
# Keys of param_groups that C has, too, besides betas; others choose torch's loops.
SETTINGS = (
    *(
        "lr",
        "weight_decay",
        "maximize",
        "momentum",
        "dampening",
        "nesterov",
        "eps",
        "amsgrad",
        "alpha",
        "centered",
        "rho",
    ),
    *("lr_decay", "initial_accumulator_value", "momentum_decay", "decoupled_weight_decay", "grad_averaging"),
    *("bias_correction", "adam_w_mode", "use_nvlamb", "max_update_rms"),
    *("max_norm", "norm_type", "skip_nonfinite", "stochastic_rounding"),
)
ONLY_IN = {"momentum_decay": "nadam", "alpha": "rmsprop", "rho": "adadelta", "lr_decay": "adagrad"}


class Setting(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_double)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("grad_dtype", ctypes.c_int),
    ]


class Result(ctypes.Structure):
    _fields_ = [
        ("total_norm", ctypes.c_double),
        ("coefficient", ctypes.c_double),
        ("clamped", ctypes.c_int64),
        ("skipped", ctypes.c_int),
    ]


def load():
    library = ctypes.CDLL(str(LIBRARY))
    plan, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, *arguments in (
        ("error", text),
        ("capability", text),
        ("plan_new", plan, text, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
        ("plan_free", None, plan),
        ("step", ctypes.c_int, plan, ctypes.POINTER(Result)),
        ("set", ctypes.c_int, plan, text, ctypes.c_double),
        ("set_grad", ctypes.c_int, plan, ctypes.c_size_t, ctypes.c_void_p),
        ("state", ctypes.c_void_p, plan, ctypes.c_size_t, text, ctypes.POINTER(ctypes.c_int)),
        ("is_new", ctypes.c_int, plan, ctypes.c_size_t),
        ("resume", ctypes.c_int, plan, ctypes.c_size_t),
        ("set_threads", None, plan, ctypes.c_int, ctypes.c_void_p),
    ):
        function = getattr(library, f"fastclip_{name}")
        function.restype, function.argtypes = result, arguments
    return library


library = load()
NOWHERE = ctypes.c_double()


class Refused(Exception):
    pass


def settings_of(optimizer):
    """The settings of an optimizer in Python, as C has them."""
    rule, group = optimizer._rule.name, optimizer.param_groups[0]
    found = {}
    for name in SETTINGS:
        if group.get(name) is not None:
            found[name] = float(group[name])
    for name, value in zip(("beta1", "beta2"), group.get("betas", ()), strict=False):
        found[name] = value
    if group["stochastic_rounding"]:
        found["rounding_seed"] = group["rounding_seed"]
    if group["momentum_dtype"] is not None:
        found["momentum_dtype"] = DTYPES.index(group["momentum_dtype"])
    clip = group["clip_value"]
    if clip is not None:
        found |= {"clip_low": clip[0], "clip_high": clip[1]} if isinstance(clip, tuple) else {"clip_value": clip}
    return rule, found


def address_of(grad):
    """Returns where a gradient is, None where there is none. An empty one is nowhere in torch, and somewhere in C."""
    return None if grad is None else grad.data_ptr() or ctypes.addressof(NOWHERE)


class Plan:
    """A plan of parameters, whose gradients are those of torch."""

    def __init__(self, optimizer, settings, params, **changed):
        self.params = list(params)
        rules = [rule for rule in RULES if rule.name == optimizer]
        self.numbers = rules[0].number_states if rules else ()
        settings = [Setting(name.encode(), value) for name, value in settings.items()]
        tensors = [self._tensor(param, **changed) for param in self.params]
        arrays = (Setting * len(settings))(*settings), (Tensor * len(tensors))(*tensors)
        self.plan = library.fastclip_plan_new(optimizer.encode(), arrays[0], len(settings), arrays[1], len(tensors))
        if not self.plan:
            raise Refused(library.fastclip_error().decode())

    def _tensor(self, tensor, **changed):
        grad_dtype = DTYPES.index(tensor.dtype if tensor.grad is None else tensor.grad.dtype)
        given = {"param": tensor.data_ptr(), "numel": tensor.numel(), "dtype": DTYPES.index(tensor.dtype)}
        return Tensor(**{**given, "grad_dtype": grad_dtype, **changed})

    def __del__(self):
        if getattr(self, "plan", None):
            library.fastclip_plan_free(self.plan)

    def check(self, failed):
        if failed:
            raise Refused(library.fastclip_error().decode())

    def set(self, name, value):
        self.check(library.fastclip_set(self.plan, name.encode(), value))

    def step(self):
        for i, param in enumerate(self.params):
            self.check(library.fastclip_set_grad(self.plan, i, address_of(param.grad)))
        result = Result()
        self.check(library.fastclip_step(self.plan, ctypes.byref(result)))
        return result

    def state(self, index, name):
        """Returns a view of a state's memory, flat; None where there is none."""
        found = ctypes.c_int()
        address = library.fastclip_state(self.plan, index, name.encode(), ctypes.byref(found))
        if not address:
            return None
        dtype = DTYPES[found.value]
        numel = 1 if name in self.numbers else self.params[index].numel()
        array = (ctypes.c_char * (numel * dtype.itemsize)).from_address(address)
        return torch.frombuffer(array, dtype=dtype)

    def is_new(self, index):
        return library.fastclip_is_new(self.plan, index)

    def resume(self, index):
        self.check(library.fastclip_resume(self.plan, index))
