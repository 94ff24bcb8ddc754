"""nnUNetv2_train ... -tr nnsslTrainer_Finetune"""

from nnssl_ext.training.finetune import nnsslTrainer_Finetune

__all__ = ["nnsslTrainer_Finetune"]
