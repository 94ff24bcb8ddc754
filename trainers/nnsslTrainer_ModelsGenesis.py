"""nnUNetv2_train ... -tr nnsslTrainer_ModelsGenesis"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_ModelsGenesis = pretraining_trainer("models_genesis")
