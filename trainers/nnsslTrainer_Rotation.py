"""nnUNetv2_train ... -tr nnsslTrainer_Rotation"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_Rotation = pretraining_trainer("rotation")
