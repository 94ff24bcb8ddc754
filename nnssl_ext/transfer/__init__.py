"""Pretrained weights from anywhere into the network of any nnU-Net plans, with a report."""
