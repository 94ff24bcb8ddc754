"""nnUNetv2_train ... -tr nnsslTrainer_RelativePatchLocation"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_RelativePatchLocation = pretraining_trainer("relative_patch_location")
