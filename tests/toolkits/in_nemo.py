"""A program of a user of NeMo, as in its examples: python -m tests.toolkits.in_nemo key=value ..."""

import lightning.pytorch as pl
import torch
from nemo.collections.asr.models import EncDecCTCModel
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager


@hydra_runner(config_path=".", config_name="nemo")
def main(config):
    pl.seed_everything(0)
    trainer = pl.Trainer(**config.trainer)
    exp_manager(trainer, config.get("exp_manager"))
    model = EncDecCTCModel(config.model, trainer)
    trainer.fit(model)
    torch.save(model.state_dict(), f"{trainer.default_root_dir}/model.pt")


if __name__ == "__main__":
    main()
