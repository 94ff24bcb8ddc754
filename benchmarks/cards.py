"""Estimate the largest batch on GPUs of 8, 24 and 80 GB, for the table of docs/reference/networks.md.

    python -m benchmarks cards [--networks vit_small pct_net ...]

For each network of ours, and each objective that it is meant for, the largest batch of a training step as
``nnssl_ext plan --gpu-memory-target`` finds it, at several patches: isotropic cases of one channel, 128 voxels wide.
"""

from __future__ import annotations

import argparse

from nnssl_ext.methods import METHODS
from nnssl_ext.recipe import assignments_recipe, derive_plans, load_recipe
from nnssl_ext.training.memory.estimate import GIB, planned_memory
from tests.datasets import make_labels, make_plans

CARDS = (8, 24, 80)
#: Recipe, objective, patches, and whether activations are computed twice.
ROWS = [
    *[("vit_small", method, [(96, 96, 96), (128, 128, 128)], False) for method in ("volume_fusion", "dino")],
    *[("vit_base", method, [(96, 96, 96), (128, 128, 128)], False) for method in ("volume_fusion", "dino")],
    ("vit_large", "volume_fusion", [(96, 96, 96), (112, 112, 112)], True),
    ("3dino", "dino", [(96, 96, 96)], True),
    ("pct_net", "volume_fusion", [(80, 80, 80), (128, 128, 128)], False),
    ("pct_net", "volume_fusion", [(80, 80, 80), (128, 128, 128)], True),
    ("pct_net", "dino", [(80, 80, 80), (128, 128, 128)], False),
    ("mis_fm", "volume_fusion", [(64, 128, 128)], False),
]


def fitting(recipe: str, method: str, patch: tuple[int, int, int], checkpointing: bool) -> list[int]:
    """Return the largest batch for each of ``CARDS``; 0 if no batch fits."""
    base = make_plans("plain")
    base["configurations"]["3d_fullres"] |= {"spacing": [1.0] * 3, "median_image_size_in_voxels": [128] * 3}
    # a batch that is set keeps the patch, also where a method would choose smaller crops
    words = [f"configuration.patch_size={list(patch)}", "crop_size=null", "batch_size=2"]
    words += ["activation_checkpointing=true"] if checkpointing else []
    plans = derive_plans(base, "cards", [load_recipe(recipe), assignments_recipe(words)], ["3d_fullres"])
    needs = planned_memory(METHODS[method], plans, "3d_fullres", {"channel_names": {"0": "MR"}, **make_labels("plain")})
    return [needs.largest_batch(gigabytes * GIB) for gigabytes in CARDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted({row[0] for row in ROWS}), help="default: all")
    arguments = parser.parse_args()
    cards = [f"{gigabytes} GB" for gigabytes in CARDS]
    print(f"| {' | '.join(['recipe', 'objective', 'patch', 'checkpointing', *cards])} |")
    print("|---" * (4 + len(CARDS)) + "|")
    for recipe, method, patches, checkpointing in ROWS:
        if arguments.networks and recipe not in arguments.networks:
            continue
        for patch in patches:
            found = [str(n) if n else "-" for n in fitting(recipe, method, patch, checkpointing)]
            edges = " x ".join(map(str, patch)) if len(set(patch)) > 1 else f"{patch[0]}^3"
            cells = [f"`{recipe}`", METHODS[method].title, edges, "yes" if checkpointing else "no", *found]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
