"""nnUNetv2_train ... -tr nnsslTrainer_Jigsaw"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_Jigsaw = pretraining_trainer("jigsaw")
