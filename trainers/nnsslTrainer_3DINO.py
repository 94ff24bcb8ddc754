"""nnUNetv2_train ... -tr nnsslTrainer_3DINO"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_3DINO = pretraining_trainer("dino")
