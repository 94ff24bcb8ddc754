"""Whether an objective learns: its readable number on held-out cases, against chance, and with voxels shuffled.

    python -m benchmarks learning jigsaw -d 802 -p nnUNetPlans_learning [--shuffled]

Runs the method's trainer as nnUNetv2_train would, on the CPU, and prints one line per epoch. With --shuffled the voxels
of every image and patch are put in another order: what is learned then was no anatomy.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods import METHODS, Method
from nnssl_ext.resources import resource_folder
from nnssl_ext.views.random import BatchRandom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("-d", default="802", help="data set, preprocessed")
    parser.add_argument("-p", default="nnUNetPlans", help="plans with the settings of the run")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument("--shuffled", action="store_true", help="voxels in another order")
    arguments = parser.parse_args()

    os.environ["nnUNet_extTrainer"] = str(resource_folder("trainers"))
    # torch's own settings follow nnU-Net's import
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    name, fold = METHODS[arguments.method].trainer, arguments.f if arguments.f == "all" else int(arguments.f)
    trainer = get_trainer_from_args(arguments.d, "3d_fullres", fold, name, arguments.p, device=torch.device("cpu"))
    trainer.initialize()
    if arguments.shuffled:
        trainer.disable_checkpointing = True
        shuffle_voxels(trainer.method)
    trainer.run_training()

    log = trainer.logger.local_logger.my_fantastic_logging
    terms = sorted(key for key in log if key.startswith("val_"))
    print("epoch " + " ".join(terms))
    for epoch, row in enumerate(zip(*(log[key] for key in terms), strict=True)):
        print(f"{epoch:5d} " + " ".join(f"{value:{len(term)}.4f}" for term, value in zip(terms, row, strict=True)))
    seconds = np.subtract(log["epoch_end_timestamps"], log["epoch_start_timestamps"]).sum()
    print(f"{trainer.step} steps, {seconds:.0f} s")


def shuffle_voxels(method: Method) -> None:
    """Make ``method`` see every image or patch with its voxels in an order of its own, channels together."""
    original = method.views

    def shuffled(images: torch.Tensor, indices: list[int]) -> torch.Tensor:
        flat = images.flatten(3).flatten(0, 1)
        orders = [np.random.default_rng((*indices, n)).permutation(flat.shape[-1]) for n in range(len(flat))]
        flat = torch.stack([image[:, torch.from_numpy(o)] for image, o in zip(flat, orders, strict=True)])
        return flat.view_as(images)

    def views(batch: CropBatch, random: BatchRandom) -> dict[str, torch.Tensor]:
        result = original(batch, random)
        for key, images in result.items():
            if images.ndim == 6:  # (B, N, C, D, H, W)
                result[key] = shuffled(images, batch.indices)
            elif images.ndim == 5 and images.is_floating_point():  # (B, C, D, H, W)
                result[key] = shuffled(images[:, None], batch.indices)[:, 0]
        return result

    method.views = views  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
