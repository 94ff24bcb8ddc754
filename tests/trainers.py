"""A stock trainer that is short: its class is nnU-Net's but for the numbers of epochs and steps."""

from pathlib import Path

#: Its name; an epoch of stock's has 250 steps.
SHORT = "nnUNetTrainer_1short"
_CODE = f"""import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class {SHORT}(nnUNetTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 5, 2
"""


def short_trainer(root: Path) -> str:
    """Write it into a folder of its own, for ``nnUNet_extTrainer``; returns that folder."""
    folder = root / "short_trainer"
    folder.mkdir(exist_ok=True)
    (folder / f"{SHORT}.py").write_text(_CODE)
    return str(folder)
