"""ESPnet: importing this makes `optim: fastclip_adamw` and the others known.

    python -c "import fastclip.integrations.espnet; from espnet2.bin.asr_train import main; main()" --config train.yaml

with `optim: fastclip_adamw` and, in `optim_conf`, the settings of fastclip, in train.yaml. To leave the configuration
as it is, use `python -m fastclip.run -m espnet2.bin.asr_train`.
"""

from espnet2.tasks.abs_task import optim_classes

from .names import OPTIMIZERS

optim_classes.update(OPTIMIZERS)
