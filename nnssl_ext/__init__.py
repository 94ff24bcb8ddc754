"""Self-supervised pretraining for stock nnU-Net."""

__version__ = "0.2.0"
