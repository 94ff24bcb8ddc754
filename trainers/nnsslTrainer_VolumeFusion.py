"""nnUNetv2_train ... -tr nnsslTrainer_VolumeFusion"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_VolumeFusion = pretraining_trainer("volume_fusion")
