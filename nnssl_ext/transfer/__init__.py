"""Transfer of pretrained weights from anywhere into the network of any nnU-Net plans."""
