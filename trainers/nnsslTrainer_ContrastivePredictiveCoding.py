"""nnUNetv2_train ... -tr nnsslTrainer_ContrastivePredictiveCoding"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_ContrastivePredictiveCoding = pretraining_trainer("contrastive_predictive_coding")
