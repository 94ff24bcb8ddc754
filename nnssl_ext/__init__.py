"""Self-supervised pretraining for stock nnU-Net."""

__version__ = "0.1.0"
