"""Gradient clipping and the optimizer update of all parameters, in one pass over memory."""

from ._extension import build_info
from .accumulation import clipped_accumulation
from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .clip_grad import clip_grad_norm_, clip_grad_value_
from .clip_stats import ClipStats
from .dequantized import dequantized
from .in_backward import step_in_backward
from .lamb import LAMB
from .lion import Lion
from .nadam import NAdam
from .norm_rules import EmaNorm, QuantileNorm
from .novograd import NovoGrad
from .patching import patch
from .radam import RAdam
from .rmsprop import RMSprop
from .scaled_adam import ScaledAdam
from .sgd import SGD

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ClipStats",
    "EmaNorm",
    "QuantileNorm",
    "RMSprop",
    "RAdam",
    "NAdam",
    "NovoGrad",
    "ScaledAdam",
    "Adagrad",
    "Adadelta",
    "LAMB",
    "Lion",
    "build_info",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clipped_accumulation",
    "dequantized",
    "patch",
    "step_in_backward",
]
