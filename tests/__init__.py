"""Tests mirror the package; whole stock commands run in a temporary nnU-Net environment."""

import os

# how many processes stock starts to write and measure predictions, each of which imports torch; nnU-Net reads it when
# it is imported, and takes eight otherwise
os.environ["nnUNet_def_n_proc"] = "1"
