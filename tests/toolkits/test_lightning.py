"""PyTorch Lightning's mixed precision and its clip, which asks the optimizer whether it unscales by itself."""

import logging
import warnings

import pytest
import torch

pl = pytest.importorskip("pytorch_lightning", reason="needs pytorch-lightning (requirements-trainers.txt)")

import fastclip  # noqa: E402

SGD = {"lr": 0.1, "momentum": 0.9}


class Module(pl.LightningModule):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.make = torch.nn.Linear(4, 2), make

    def training_step(self, batch, _):
        return (10 * self.layer(batch)).square().mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


def train(make, precision, gradient_clip_val):
    torch.manual_seed(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    how = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        how = {"plugins": [pl.plugins.precision.MixedPrecision(precision, "cpu", scaler)]}
    module = Module(make)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, gradient_clip_val=gradient_clip_val, **how,
        ).fit(module, torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=4))  # fmt: skip
    return module.layer.weight.detach()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
def test_mixed_precision_with_lightnings_clip_or_the_own(precision):
    expected = train(lambda params: torch.optim.SGD(params, **SGD), precision, 0.5)
    assert not torch.equal(expected, train(lambda params: torch.optim.SGD(params, **SGD), precision, 0.0))
    theirs = train(lambda params: fastclip.SGD(params, **SGD), precision, 0.5)
    torch.testing.assert_close(theirs, expected, rtol=1e-6, atol=1e-6)
    own = train(lambda params: fastclip.SGD(params, **SGD, max_norm=0.5), precision, 0.0)
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
    if precision != "16-mixed":
        both = train(lambda params: fastclip.SGD(params, **SGD, max_norm=0.5), precision, 0.5)
        torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)


def test_two_clips_under_fp16_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        train(lambda params: fastclip.SGD(params, **SGD, max_norm=0.5), "16-mixed", 0.5)
