"""Record what must not change when code moves: weights, objectives, transferred tensors and a study's numbers.

    python -m benchmarks record --output before.json --code OLD_CHECKOUT
    python -m benchmarks record --output after.json --compare before.json
    python -m benchmarks record --only dino transfer --compare benchmarks/record_before.json

Each method and the fine-tuner train for twenty steps with a fixed seed in float32 on one thread. Trainings go through
nnU-Net's own entry point, transfer and the study through the command line. The script therefore runs on every version.
Hashes are equal only on the same kind of processor. Exit status 1: something differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.checkout import add_option, run_on, set_environment, spelled, trainer_name

CONFIGURATION = "3d_fullres"
EPOCHS, STEPS = 4, 5
METHODS = (
    "volume_fusion",
    "masked_autoencoder",
    "contrastive_predictive_coding",
    "rotation",
    "jigsaw",
    "relative_patch_location",
    "exemplar",
    "variable_dimension_transform",
    "dino",
)
KINDS = ("plain", "residual", "anisotropic")
TRANSFER_TARGETS = ("plain", "residual", "anisotropic", "vit")
#: Settings by their first names; ``spelled`` finds the names of the version that runs.
SETTINGS: dict[str, Any] = {
    "epochs": EPOCHS,
    "iterations_per_epoch": STEPS,
    "validation_iterations": 1,
    "save_every": EPOCHS,
    "precision": "float32",
    "dino": {"local_crops": 2, "hidden": 64, "bottleneck": 16, "prototypes": 128},
    "finetune": {
        "steps": EPOCHS * STEPS,
        "steps_per_epoch": STEPS,
        "validation_iterations": 1,
        "save_every": EPOCHS,
        "precision": "float32",
    },
}
STUDY = (
    "--methods scratch VolumeFusion --labels 2 --subsets 2 --steps 4 --snapshots 2 --total-baseline 1 --rates 0.01 "
    "-o study epochs=1 iterations_per_epoch=2 validation_iterations=1 finetune.steps_per_epoch=2 precision=float32 "
    "finetune.precision=float32"
)


def names() -> list[str]:
    """List all items of the record."""
    trained = [f"{method}/{kind}" for method in (*METHODS, "finetune") for kind in KINDS]
    return [*trained, "dino/vit", "volume_fusion/pct_net", "finetune/vit", "finetune/pct_net", "transfer", "study"]


def write_plans(root: Path, kind: str) -> None:
    """Add the plans of the record to a data set of ``benchmarks.workload``."""
    from benchmarks.workload import dataset_name
    from nnssl_ext.settings import CommonSettings

    folder = root / "preprocessed" / dataset_name(kind)
    settings = {**SETTINGS, **{name: spelled(name, SETTINGS[name]) for name in ("dino", "finetune")}}
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    if "restore_weight_lengths" in {field.name for field in fields(CommonSettings)}:
        settings["restore_weight_lengths"] = False  # weights as version 0.1 wrote them
    plans |= {"plans_name": "record", "nnssl_ext": {**settings, "images": str(root / "images")}}
    (folder / "record.json").write_text(json.dumps(plans))


def digest(weights: Mapping[str, Any]) -> str:
    """Return the sha256 of named tensors, independent of their order."""
    result = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        result.update(tensor.numpy().tobytes())
    return result.hexdigest()


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint's plain content."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=False)


def trained(root: Path, item: str) -> dict[str, Any]:
    """Train one item and return its hash and its objective values."""
    import torch
    from nnunetv2.run.run_training import run_training

    from benchmarks.workload import dataset_name

    method, kind = item.split("/")
    trainer = trainer_name(method)
    run_training(dataset_name(kind), CONFIGURATION, 0, trainer, "record", device=torch.device("cpu"))
    fold = root / "results" / dataset_name(kind) / f"{trainer}__record__{CONFIGURATION}" / "fold_0"
    content = read(fold / "checkpoint_final.pth")
    log = {name: numbers(values) for name, values in content["logging"].items() if "timestamp" not in name}
    return {"weights": digest(content["network_weights"]), "log": {k: v for k, v in log.items() if v}}


def numbers(values: Any) -> list[float]:
    """Flatten logged values to floats."""
    if isinstance(values, (list, tuple)):
        return [number for value in values for number in numbers(value)]
    return [float(values)] if hasattr(values, "__float__") else []


def transferred(root: Path) -> dict[str, Any]:
    """Transfer six sources into four targets and return the hashes of the written tensors."""
    from benchmarks.workload import NUMBERS, write_sources

    result = {}
    for source in write_sources(root):
        for kind in TRANSFER_TARGETS:
            file = root / f"{source.stem}_{kind}.pth"
            words = ["transfer", str(source), "-d", str(NUMBERS[kind]), "-c", CONFIGURATION, "-o", str(file)]
            status = command(words)
            result[f"{source.stem} into {kind}"] = "refused" if status else digest(read(file)["network_weights"])
    return result


def command(words: list[str]) -> int:
    """Run ``nnssl_ext`` in this process; return its exit status."""
    from nnssl_ext.cli import main
    from nnssl_ext.errors import UserError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return main(words)
    except UserError as error:
        print(f"{shlex_join(words)}: {error}", file=sys.stderr)
        return 1


def shlex_join(words: list[str]) -> str:
    """Join the words of a command, without the paths' folders."""
    return " ".join(Path(word).name if os.sep in word else word for word in words)


def studied(root: Path) -> dict[str, Any]:
    """Run a tiny study and return the numbers of its results and its report."""
    import pandas

    from benchmarks.workload import NUMBERS

    os.chdir(root)
    words = ["study", "-d", str(NUMBERS["plain"]), "-c", CONFIGURATION, "-device", "cpu", *STUDY.split()]
    if status := command(words):
        logs = "\n".join(log.read_text()[-2000:] for log in (root / "study" / "logs").rglob("*.txt"))
        raise RuntimeError(f"the study ended with {status}\n{logs}")
    results = pandas.read_csv(root / "study" / "results.csv").select_dtypes("number")
    text = re.sub(r"## Cost.*?(?=\n## |\Z)", "", (root / "study" / "report.md").read_text(), flags=re.DOTALL)
    rows = sorted(map(list, results.itertuples(index=False)), key=repr)
    return {"rows": [[repr(float(value)) for value in row] for row in rows], "report": decimals(text)}


def decimals(text: str) -> list[str]:
    """List the different numbers with at least two decimals in a text."""
    return sorted(set(re.findall(r"[-+]?\d+\.\d{2,}", text)))


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a forked process, so that no state reaches the next item."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def call() -> None:
        import torch

        with open(os.devnull, "w") as nothing:  # nnU-Net prints every epoch
            os.dup2(nothing.fileno(), 1)
        torch.set_num_threads(1)
        there.send(function(*arguments))

    process = context.Process(target=call)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return {"failed": True}
    finally:
        process.join()


def record(only: list[str]) -> dict[str, Any]:
    """Compute the chosen items in a temporary nnU-Net environment."""
    chosen = [name for name in names() if not only or any(part in name.split("/") or part == name for part in only)]
    if not chosen:
        raise SystemExit(f"No item matches {' '.join(only)}. Items: {', '.join(names())}.")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        set_environment(root)
        from benchmarks.workload import write_images, write_tiny

        kinds = {kind for name in chosen for kind in needed(name)}
        for kind in sorted(kinds):
            write_tiny(root, kind)
            write_plans(root, kind)
        write_images(root / "images")
        for name in chosen:
            begin = time.monotonic()
            function = {"transfer": transferred, "study": studied}.get(name)
            result[name] = alone(function, root) if function else alone(trained, root, name)
            print(f"{name:45s} {time.monotonic() - begin:5.1f} s", file=sys.stderr, flush=True)
    return result


def needed(name: str) -> tuple[str, ...]:
    """Return the data sets of an item."""
    return {"transfer": TRANSFER_TARGETS, "study": ("plain",)}.get(name) or (name.split("/")[1],)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """List what differs, item by item. Names of logged terms may change, their values may not."""
    lines = []
    for name, value in after.items():
        old = before.get(name)
        if old is None:
            lines.append(f"{name}: not in the earlier record")
        elif name == "study":
            missing = sorted(set(old["report"]) - set(value["report"]))
            lines += [f"study: results differ: {old['rows']} to {value['rows']}"] * (old["rows"] != value["rows"])
            lines += [f"study: the report lacks {', '.join(missing)}"] * bool(missing)
        elif name == "transfer":
            lines += [f"transfer: {pair}: differs" for pair in old if old[pair] != value.get(pair)]
        else:
            lines += [f"{name}: weights differ"] * (old["weights"] != value["weights"])
            left = list(value["log"].values())
            lines += [f"{name}: {term}: {values}" for term, values in old["log"].items() if values not in left]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file to write")
    parser.add_argument("--compare", type=Path, help="an earlier record; exit status 1 if something differs")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="a method, a network kind, or an item")
    add_option(parser)
    arguments = parser.parse_args()
    run_on(arguments.code, "record")
    from benchmarks.measure import machine

    items = record(arguments.only)
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(), "items": items}, indent=1) + "\n")
    failed = [name for name, value in items.items() if "failed" in value]
    lines = [f"{name}: failed" for name in failed]
    items = {name: value for name, value in items.items() if name not in failed}
    if arguments.compare:
        earlier = json.loads(arguments.compare.read_text())
        lines += differences(earlier["items"], items)
        print(f"{len(items)} items compared with {arguments.compare.name}: {len(lines)} differences")
    print("\n".join(lines))
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
