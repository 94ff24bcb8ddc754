"""Pretraining data sets made from images without labels."""

#: Key in a corpus's dataset.json: the data set whose network is pretrained.
TARGET_KEY = "nnssl_ext_target"
