"""nnUNetv2_train ... -tr nnsslTrainer_MaskedAutoencoder"""

from nnssl_ext.training.pretraining.classes import pretraining_trainer

nnsslTrainer_MaskedAutoencoder = pretraining_trainer("masked_autoencoder")
