"""Extract feature vectors and feature maps with a pretrained encoder."""
