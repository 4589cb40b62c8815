"""Steps in the backward pass of a loss that goes through a model which it is not to train."""

import copy
from contextlib import contextmanager

import pytest
import torch

import fastclip
from tests.support.in_backward_cases import assert_same


@contextmanager
def frozen(model, *_):
    model.requires_grad_(False)
    yield
    model.requires_grad_(True)


@contextmanager
def accumulating(_, optimizer, in_backward):
    with in_backward.accumulate():
        yield
    optimizer.zero_grad()


def adversaries():
    """A generator and a discriminator, each with an optimizer."""
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)) for _ in range(2)]
    return [(model, fastclip.SGD(model.parameters(), lr=0.1, momentum=0.9, clip_value=0.05)) for model in models]


@pytest.mark.parametrize("bucket_cap_mb", [0, 4])
@pytest.mark.parametrize("way_out", [frozen, accumulating, None], ids=["frozen", "accumulate", "none"])
def test_the_loss_of_a_generator_goes_through_a_discriminator(way_out, bucket_cap_mb):
    """Its pass steps on the discriminator, too, unless one of the two ways out that are documented is taken."""
    ordinary, stepped = adversaries(), adversaries()
    in_backward = [fastclip.step_in_backward(*each, bucket_cap_mb=bucket_cap_mb) for each in stepped]
    for number in range(3):
        noise, real = torch.randn(2, 5, 4)
        for (generator, g_optimizer), (discriminator, d_optimizer) in (ordinary, stepped):
            loss = discriminator(generator(noise).detach()).sum() - discriminator(real).sum()
            loss.backward()
            d_optimizer.step()
            d_optimizer.zero_grad()
            before = copy.deepcopy(discriminator)
            if generator is stepped[0][0] and way_out is not None:
                with way_out(discriminator, d_optimizer, in_backward[1]):
                    discriminator(generator(noise)).square().sum().backward()
            else:
                discriminator(generator(noise)).square().sum().backward()
            g_optimizer.step()
            g_optimizer.zero_grad()
            d_optimizer.zero_grad()
        if way_out is None:
            assert number == 0 and not torch.equal(before[0].weight, discriminator[0].weight)
            return
        for first, second in zip(ordinary, stepped, strict=True):
            assert_same(first, second)
