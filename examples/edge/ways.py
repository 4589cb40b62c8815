"""What of a Conformer is trained: all layers, the last ones, or low-rank matrices beside its feed-forward layers."""

import torch
import torch.nn.functional as F
from torch import nn


class LoRA(nn.Module):
    """A frozen linear layer, and beside it one of low rank that learns (Hu et al., 2021). Starts as the layer itself.

    The product of the two small matrices is never formed while training: it would take the memory of the layer.
    """

    def __init__(self, linear, rank=8):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self):
        """Returns the frozen layer with what was learnt added to its weight: as fast and as large as before."""
        self.linear.weight += self.up @ self.down
        return self.linear


def replace_modules(model, kind, new):
    """Puts `new(module)` in the place of each module of a kind below `model`."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, kind):
                setattr(parent, name, new(module))


def add_lora(model):
    """Freezes all but LoRA's matrices and the head.

    torch's MultiheadAttention reads the weights of its linear layers and does not call them: they stay as they are.
    """
    model.requires_grad_(False)
    for layer in model.encoder.conformer_layers:
        for feed_forward in (layer.ffn1, layer.ffn2):
            replace_modules(feed_forward, nn.Linear, LoRA)
    model.head.requires_grad_(True)


def merge_lora(model):
    replace_modules(model, LoRA, LoRA.merged)


def last_layers(model):
    """Freezes all but the last Conformer layer and the head."""
    model.requires_grad_(False)
    model.encoder.conformer_layers[-1].requires_grad_(True)
    model.head.requires_grad_(True)


def all_layers(model):
    model.requires_grad_(True)


WAYS = {"last layers": last_layers, "LoRA": add_lora, "all layers": all_layers}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]
