r"""FunASR: importing this makes `++optim=fastclip_adamw` and the others known.

    python -c "import fastclip.integrations.funasr; from funasr.bin.train import main_hydra; main_hydra()" \
        ++optim=fastclip_adamw ++optim_conf.max_norm=1.0 ++train_conf.grad_clip=0

To leave the configuration as it is, use
`python -m fastclip.run -m funasr.bin.train`.
"""

from funasr.optimizers import optim_classes

from .names import OPTIMIZERS

optim_classes.update(OPTIMIZERS)
