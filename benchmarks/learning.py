"""Show whether an objective learns, on real crops and on shuffled voxels.

    python -m benchmarks learning jigsaw -d 802 -p nnUNetPlans_learning [--shuffled [after]]

It runs the method's trainer on the CPU as nnUNetv2_train would. It prints the readable measure on held-out cases and
its chance after each epoch.

With --shuffled the voxels of each crop are shuffled before views are made. Anything learned then is no anatomy but a
shortcut in the views. Objectives that compare views of the same voxels can still recognize the noise. For them,
--shuffled after shuffles the voxels of each view separately. 2-D images are always shuffled that way.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

import numpy as np
import torch

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods import METHODS, TRAINERS, Method
from nnssl_ext.views.random import BatchRandom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("-d", default="802", help="data set, preprocessed")
    parser.add_argument("-p", default="nnUNetPlans", help="plans with the settings of the run")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument(
        "--shuffled", nargs="?", const="before", choices=("before", "after"), help="voxels in another order"
    )
    arguments = parser.parse_args()

    # torch's own settings follow nnU-Net's import
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    name, fold = TRAINERS[arguments.method], arguments.f if arguments.f == "all" else int(arguments.f)
    trainer = get_trainer_from_args(arguments.d, "3d_fullres", fold, name, arguments.p, device=torch.device("cpu"))
    trainer.initialize()
    if arguments.shuffled:
        trainer.disable_checkpointing = True
        shuffle_voxels(trainer.method, "after" if trainer.method.learns_from != "cases" else arguments.shuffled)
    trainer.run_training()

    log = trainer.logger.local_logger.my_fantastic_logging
    terms = sorted(key for key in log if key.startswith("val_"))
    print("epoch " + " ".join(terms))
    for epoch, row in enumerate(zip(*(log[key] for key in terms), strict=True)):
        print(f"{epoch:5d} " + " ".join(f"{value:{len(term)}.4f}" for term, value in zip(terms, row, strict=True)))
    seconds = np.subtract(log["epoch_end_timestamps"], log["epoch_start_timestamps"]).sum()
    print(f"{trainer.step} steps, {seconds:.0f} s")


def shuffle_voxels(method: Method, when: str) -> None:
    """Shuffle the voxels of a method's images, all channels alike.

    Args:
        method: Its ``views`` are replaced.
        when: ``before`` views are made, or ``after``, in each view or patch separately.
    """
    original = method.views

    def shuffled(image: torch.Tensor, *seed: int) -> torch.Tensor:
        order = np.random.default_rng(seed).permutation(image[0].numel())
        return image.flatten(1)[:, torch.from_numpy(order)].view_as(image)

    def before(batch: CropBatch, random: BatchRandom) -> dict[str, torch.Tensor]:
        rows = [
            [replace(b, data=shuffled(b.data, index, place)) for b, index in zip(row, batch.indices, strict=True)]
            for place, row in enumerate(batch.boxes)
        ]
        return original(replace(batch, boxes=rows), random)

    def after(batch: CropBatch, random: BatchRandom) -> dict[str, torch.Tensor]:
        result = original(batch, random)
        for key, images in result.items():
            if images.ndim in (5, 6) and images.is_floating_point():  # (B, C, D, H, W), (B, N, C, D, H, W)
                several = images if images.ndim == 6 else images[:, None]
                result[key] = torch.stack(
                    [
                        torch.stack([shuffled(image, index, n) for n, image in enumerate(own)])
                        for own, index in zip(several, batch.indices, strict=True)
                    ]
                ).view_as(images)
        return result

    method.views = before if when == "before" else after  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
