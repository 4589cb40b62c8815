"""NVIDIA NeMo: importing this makes `model.optim.name=fastclip_adamw` and the others known.

    import fastclip.integrations.nemo

in the script that trains, before it makes its model; the settings of fastclip stand beside `name`, as in
`+model.optim.max_norm=1.0`, and `trainer.gradient_clip_val=0` leaves the clip to them. To leave script and
configuration as they are, use `python -m fastclip.run script.py`.
"""

from nemo.core.config.optimizers import OptimizerParams
from nemo.core.optim.optimizers import register_optimizer

from .names import OPTIMIZERS

for name, optimizer in OPTIMIZERS.items():
    register_optimizer(name, optimizer, OptimizerParams)  # NeMo wants defaults; the optimizers' own hold
