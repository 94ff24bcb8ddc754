"""nnUNetv2_train ... -tr nnsslTrainer_VariableDimensionTransform"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_VariableDimensionTransform = pretraining_trainer("variable_dimension_transform")
