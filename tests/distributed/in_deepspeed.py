"""fastclip's optimizers in DeepSpeed's engine, on the CPU: beside torch's, with DeepSpeed's own clip."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastclip

from .compare import on_ranks

STEPS, CLIP = 4, 0.1
RULES = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.01}}


def import_deepspeed():
    """Without its all-reduce in shared memory, which takes a minute to compile."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def make_engine(library, kind, stage, groups=1, config=None, **settings):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    params = (
        list(model.parameters()) if groups == 1 else [{"params": list(m.parameters())} for m in (model[0], model[2])]
    )
    optimizer = getattr(library, kind)(params, **RULES[kind], **settings)
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **(config or {}),
        },
    )
    return engine


def pass_back(engine, step):
    torch.manual_seed(10 * step + dist.get_rank())
    x = torch.randn(4, 6).to(next(engine.module.parameters()).dtype)
    engine.backward(engine(x).float().square().sum())


def train(*how, **settings):
    """The norms that fastclip's optimizer has seen, and the parameters."""
    engine, norms = make_engine(*how, **settings), []
    for step in range(STEPS):
        pass_back(engine, step)
        engine.step()
        norms.append(getattr(getattr(engine.optimizer, "optimizer", engine.optimizer), "total_norm", None))
    return norms, parameters_of(engine)


def parameters_of(engine):
    """At stage 3 this rank's parts, which is where the values are."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]


def assert_same(params, expected, rtol):
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)


@on_ranks()
def deepspeed_clips():
    for stage in (0, 1, 2):
        for kind, clip, rtol in (("SGD", 0.0, 0), ("SGD", CLIP, 0), ("AdamW", CLIP, 1e-6)):
            config = {"gradient_clipping": clip}
            _, expected = train(torch.optim, kind, stage, config=config, foreach=False)
            _, params = train(fastclip, kind, stage, config=config)
            assert_same(params, expected, rtol)


@on_ranks()
def fastclip_clips_what_is_whole():
    """On one rank, and at stage 0 on any number: in float32, and over the float32 copies of a bfloat16 model."""
    in_bfloat16 = {"bf16": {"enabled": True}}
    for stage in (0, 1, 2, 3) if dist.get_world_size() == 1 else (0,):
        for kind, config, rtol in (("SGD", {}, 1e-6), ("AdamW", {}, 1e-6), ("SGD", in_bfloat16, 1e-2)):
            clipped = {**config, "gradient_clipping": CLIP}
            _, expected = train(torch.optim, kind, stage, config=clipped, foreach=False)
            norms, params = train(fastclip, kind, stage, config=config, max_norm=CLIP)
            assert min(norms) > 2 * CLIP, norms
            assert_same(params, expected, rtol)


def assert_refused(setting, stage, groups=1, **settings):
    engine = make_engine(fastclip, "AdamW", stage, groups, **settings)
    pass_back(engine, 0)
    before = parameters_of(engine)
    try:
        engine.step()
    except TypeError as error:
        assert f"{setting} can't be applied" in str(error) and "gradient_clipping" in str(error), error
    else:
        raise AssertionError(f"stage {stage} has taken a step with {settings}")
    assert_same(parameters_of(engine), before, rtol=0)


@on_ranks()
def a_norm_of_a_piece_is_refused():
    """On two ranks always; on one where there are several groups, of which DeepSpeed steps on one after the other."""
    groups = 1 if dist.get_world_size() > 1 else 2
    for stage in (1, 2, 3):
        for settings in ({"max_norm": CLIP}, {"skip_nonfinite": True}):
            assert_refused(next(iter(settings)), stage, groups, **settings)


@on_ranks()
def the_recipe_ends_where_the_loop_ends():
    """Each rank takes its share of the utterances: together they are one larger batch."""
    import_deepspeed()
    from tests.support.trainers import MAX_NORM, norm_clip, options, plain_loop, recipe

    ranks, settings = dist.get_world_size(), []

    def after_step(optimizer, *_):
        settings.append({name: optimizer.param_groups[0][name] for name in ("lr", "momentum")})

    hook = register_optimizer_step_post_hook(after_step)
    model, log = recipe("with_deepspeed").train(options("--max-norm", str(MAX_NORM)))
    hook.remove()
    assert len(settings) == len(log.stats) == 8 / ranks and settings[0]["lr"] > settings[-1]["lr"]
    expected, norms = plain_loop(options("--batch", str(4 * ranks)), settings, norm_clip)
    assert min(norms) > MAX_NORM
    assert_same(list(model.parameters()), expected, rtol=1e-5)
