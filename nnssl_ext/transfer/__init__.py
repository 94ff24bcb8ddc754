"""Transfer pretrained weights into networks of any plans."""
