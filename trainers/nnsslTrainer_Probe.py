"""nnUNetv2_train ... -tr nnsslTrainer_Probe"""

from nnssl_ext.training.finetuning.probe import nnsslTrainer_Probe

__all__ = ["nnsslTrainer_Probe"]
