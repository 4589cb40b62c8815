"""Parameters and numbers for the tests of what happens beside a step."""

import torch

LARGE = 2**18 + 4097  # elements: the step releases the GIL, and its last chunk is not a whole one


def param(size=LARGE):
    """Zeros with a gradient of ones: under lr=1 each step takes 1 off every element, and no clip below is tight."""
    p = torch.zeros(size, requires_grad=True)
    p.grad = torch.ones(size)
    return p


class Number:
    """A hyperparameter that runs some code when a step reads it, as a switch to another thread would."""

    def __init__(self, value, meddle):
        self.value, self.meddle = value, meddle

    def __float__(self):
        self.meddle()
        return self.value
