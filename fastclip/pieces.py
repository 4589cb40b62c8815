"""Wrappers that exchange the parameters in an optimizer's groups for pieces: tells a piece from the whole."""

import operator
import sys

import torch

from .settings import of_whole_gradients

_is_initialized = torch.distributed.is_initialized if torch.distributed.is_available() else bool


def _may_be_pieces():
    """Returns whether there may be pieces. DeepSpeed steps group by group, even on one rank."""
    return torch.distributed.get_world_size() > 1 or "deepspeed" in sys.modules


class Given:
    """The tensors that an optimizer was given, by identity and size, and the number of their trained elements."""

    def __init__(self, rule):
        self._rule = rule
        self._sizes = {}  # by id: torch.utils.swap_tensors refuses a tensor with a weak reference
        self._trained = 0
        self._checked = [], []  # the groups' lists at the last look, and their lengths

    def add(self, params):
        """Adds the parameters of a group. Frozen ones do not count, as wrappers leave them out."""
        self._sizes.update((id(param), param.numel()) for param in params)
        self._trained += sum(_numel(param) for param in params if param.requires_grad)

    def check(self, groups):
        """Refuses a norm, or a verdict, over tensors that were not given and have fewer elements than the given ones.

        Looks at tensors only where the groups hold other lists than at the last look, or of other lengths.

        Raises:
            TypeError: DeepSpeed's ZeRO, or another wrapper, has left a piece on this rank.
        """
        if not groups or not _is_initialized():
            return
        settings = [name for group in groups for name in of_whole_gradients(group)]
        if not settings and not any(map(self._rule.needs_whole, groups)):
            return
        lists = [group["params"] for group in groups]
        lengths = list(map(len, lists))
        if lengths == self._checked[1] and all(map(operator.is_, lists, self._checked[0])):
            return
        here = [param for params in lists for param in params]
        if _may_be_pieces() and any(self._sizes.get(id(param)) != param.numel() for param in here):
            elements = sum(map(_numel, here))
            if elements < self._trained:
                way_out = "leave the setting out, and set gradient_clipping in DeepSpeed's configuration"
                if not settings:
                    way_out = "its updates follow from whole tensors, which AdamW's do not"
                raise TypeError(
                    f"{(settings or [self._rule.title])[0]} can't be applied: param_groups no longer holds the tensors "
                    f"that the optimizer was given, but others with {elements} of their {self._trained} elements. "
                    "DeepSpeed's ZeRO exchanges them so, and each rank would clip, skip or step by its own piece: "
                    f"{way_out}. If this is all that is trained, make the optimizer from these tensors"
                )
        self._checked = lists, lengths


def _numel(param):
    """Returns the number of elements on all ranks. ZeRO-3 leaves empty tensors, and the number in `ds_numel`."""
    return getattr(param, "ds_numel", None) or param.numel()
