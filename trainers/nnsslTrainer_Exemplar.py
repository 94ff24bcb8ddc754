"""nnUNetv2_train ... -tr nnsslTrainer_Exemplar"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_Exemplar = pretraining_trainer("exemplar")
