"""Pretrain every method on a real data set and hand the weights to a stock trainer.

    python -m benchmarks hand_over -d 4 --images IMAGES -o FOLDER cpu_small epochs=2 iterations_per_epoch=50

For each method ``nnssl_ext plan`` with the words at the end, ``nnUNetv2_train -tr nnsslTrainer_X``, and what
``nnUNetv2_train -pretrained_weights`` does before it trains: a stock ``nnUNetTrainer`` of these plans takes the file.
One row each: the readable number after every epoch beside its chance, the tensors that were handed over, those of
them that the pretraining has changed, and whether any that should be equal is not (then the exit status is 1). Nothing
but the plans ``nnUNetPlans_hand_over`` is written outside of FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from nnssl_ext import checkpoint
from nnssl_ext.environment import commands_path
from nnssl_ext.methods import METHODS, TRAINERS

PLANS = "nnUNetPlans_hand_over"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="data set, planned and preprocessed")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans to start from")
    parser.add_argument("-o", required=True, type=Path, help="folder for results")
    parser.add_argument("--images", help="labelled 2-D images; without them that method is left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("settings", nargs="*", help="recipes and settings")
    arguments = parser.parse_intermixed_args()
    os.environ["nnUNet_results"] = str(arguments.o.resolve())

    print("| method | steps | s | readable number | chance | tensors handed over | of them changed | equal |")
    print("|---|---|---|---|---|---|---|---|")
    right = True
    for name in arguments.methods:
        if METHODS[name].learns_from != "cases" and not arguments.images:
            continue
        row, equal = try_method(name, arguments)
        print(row, flush=True)
        right &= equal
    sys.exit(0 if right else 1)


def try_method(name: str, arguments: argparse.Namespace) -> tuple[str, bool]:
    """Return a method's row, and whether all tensors were handed over."""
    # torch's own settings follow nnU-Net's import
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    device, method = torch.device(arguments.device), METHODS[name]
    images = [f"images={Path(arguments.images).resolve()}"] if arguments.images else []
    base = ["-d", arguments.d, "-c", arguments.c]
    run("nnssl_ext", "plan", *base, "-p", arguments.p, "-o", PLANS, *arguments.settings, *images)
    begin = time.monotonic()
    run(
        *f"nnUNetv2_train {arguments.d} {arguments.c} 0 -tr {TRAINERS[method.name]} -p {PLANS}".split(),
        "-device",
        device.type,
    )
    seconds = time.monotonic() - begin

    with contextlib.redirect_stdout(io.StringIO()):
        pretraining = get_trainer_from_args(arguments.d, arguments.c, 0, TRAINERS[method.name], PLANS, device=device)
        pretraining.initialize()
        stock = get_trainer_from_args(arguments.d, arguments.c, 0, "nnUNetTrainer", PLANS, device=device)
    file = Path(pretraining.output_folder) / "checkpoint_final.pth"
    content = checkpoint.load(file)
    before = pretraining.method.exported.state_dict()
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net lists every tensor
        maybe_load_checkpoint(stock, False, False, str(file))
    handed = {key: value for key, value in stock.network.state_dict().items() if ".seg_layers." not in key}
    equal = all(torch.equal(value.cpu(), content["network_weights"][key]) for key, value in handed.items())
    changed = sum(differs(value, before.get(key)) for key, value in handed.items())

    log = content["logging"]
    told = ", ".join(f"{value:.3f}" for value in log[f"val_{method.readable.key}"])
    chance = f"{log['val_chance'][-1]:.3f}" if "val_chance" in log else "-"
    steps = content["nnssl_ext"]["counters"]["step"]
    row = f"| {method.title} | {steps} | {seconds:.0f} | {told} | {chance} | {len(handed)} | {changed} | {equal} |"
    return row, equal


def differs(value: Tensor, other: Tensor | None) -> bool:
    return other is None or not torch.equal(value.cpu(), other.cpu())


def run(*words: str) -> None:
    """Run a command of this Python's environment. Show its output if it fails."""
    finished = subprocess.run(words, env={**os.environ, "PATH": commands_path()}, text=True, capture_output=True)
    if finished.returncode:
        sys.exit(
            f"{' '.join(words)} ended with {finished.returncode}\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}"
        )


if __name__ == "__main__":
    main()
