"""nnUNetv2_train ... -tr nnsslTrainer_Finetune"""

from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune

__all__ = ["nnsslTrainer_Finetune"]
