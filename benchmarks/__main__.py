"""python -m benchmarks NAME [options]

Without a name: the list of benchmarks. Each takes --help.
"""

from __future__ import annotations

import os
import runpy
import sys

from nnssl_ext.resources import resource_folder

#: Names, and what each measures.
BENCHMARKS = {
    "loader": "crops read from .b2nd: crops a second, CPU seconds a crop, against reading the same boxes alone",
    "views": "each view, each method's full list, and peers: samples a second on one core or on the GPU",
    "peers": "complete samples against stock nnU-Net and MONAI, like for like",
    "step": "a training step, split; its ratio to the bare forward and backward pass; memory over many steps",
    "startup": "the start of a training against stock's, and against the number of cases",
    "memory": "operations and GPU memory of a step of each method: estimated, and on a GPU measured",
    "cards": "which batch of our networks fits GPUs of 8, 24 and 80 GB, estimated",
    "activation_memory": "what a network of ours keeps for its backward pass, counted",
    "dino_step": "3DINO's student step against its bare blocks and heads",
    "resolution": "voxels of the plan per voxel that each method's network sees",
    "learning": "whether an objective learns, on real crops and on shuffled voxels",
    "dino_learning": "whether 3DINO's terms learn: gradients, information of the targets, masked patches",
    "gpu": "everything on a GPU in one command: values, stock commands, compiler, speed, loader, ranks, a study",
    "launches": "kernels of a step outside the network, for each method",
    "hand_over": "every method on a real data set, through the stock command into a stock trainer",
    "evidence_data": "the data sets and plans of version 0.2's evidence, made from public ones",
    "simulation": "how often a study finds a gain that is there, and one that is not",
    "soak": "random kills against an uninterrupted run",
    "fuzz_atheris": "the readers of outside files, fuzzed with coverage as a guide",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHMARKS:
        listed = "\n".join(f"  {key:18s} {what}" for key, what in BENCHMARKS.items())
        text = f"usage: python -m benchmarks NAME [options]\n\n{listed}"
        if name in ("", "-h", "--help"):
            print(text)
            return
        sys.exit(f"unknown benchmark '{name}'\n{text}")
    del sys.argv[1]
    os.environ["nnUNet_extTrainer"] = str(resource_folder("trainers"))
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
