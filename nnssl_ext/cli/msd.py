"""Fetch, convert, predict and submit tasks of the Decathlon.

    nnssl_ext msd list
    nnssl_ext msd fetch Task04 [-o FOLDER] [--url MIRROR]
    nnssl_ext msd convert FOLDER/Task04_Hippocampus
    nnssl_ext msd predict Task04 -c 3d_fullres -o PREDICTIONS
    nnssl_ext msd submit Task04=PREDICTIONS -o submission.zip

Between convert and predict stands nnU-Net: plan, preprocess, pretrain, fine-tune.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnssl_ext.commands import same_number
from nnssl_ext.environment import named_folder
from nnssl_ext.errors import UserError
from nnssl_ext.files import check_writable

#: More predictions than nnU-Net exports at a time.
MOST_AT_A_TIME = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="step", metavar="STEP", required=True)

    commands.add_parser("list", help="the ten tasks, their classes and surface tolerances")

    fetch = commands.add_parser("fetch", help="download, check and unpack tasks; goes on where it was cut")
    fetch.add_argument("tasks", nargs="+", metavar="TASK", help="Task04, 4, Hippocampus or Task04_Hippocampus")
    fetch.add_argument("-o", default=".", metavar="FOLDER", help="where TaskXX_NAME goes (here)")
    fetch.add_argument("--url", help="another mirror's address of the tar file")
    fetch.add_argument("--md5", help="checksum of that file, where it is not the published one")

    convert = commands.add_parser("convert", help="make nnU-Net raw data sets, by nnU-Net's own converter")
    convert.add_argument("tasks", nargs="+", type=Path, metavar="TASK", help="a task's folder or tar file")
    convert.add_argument("-np", type=int, default=2, metavar="N", help="processes (2)")

    predict = commands.add_parser("predict", help="predict a task's test images by nnUNetv2_predict")
    predict.add_argument("task", metavar="TASK")
    predict.add_argument("-o", required=True, metavar="FOLDER", help="where the predictions go")
    predict.add_argument("-c", required=True, metavar="CONFIGURATION")
    predict.add_argument("-p", default="nnUNetPlans", metavar="PLANS")
    predict.add_argument("-tr", default="nnUNetTrainer", metavar="TRAINER")
    predict.add_argument("-f", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD", help="default: all five")
    predict.add_argument("--disable_tta", action="store_true", help="no mirroring: eight times as fast")
    predict.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"))

    submit = commands.add_parser("submit", help="check predictions and write the archive")
    submit.add_argument("predictions", nargs="+", metavar="TASK=FOLDER")
    submit.add_argument("-o", required=True, type=Path, metavar="FILE", help="the archive, a .zip")


def run(arguments: argparse.Namespace) -> None:
    {"list": _list, "fetch": _fetch, "convert": _convert, "predict": _predict, "submit": _submit}[arguments.step](
        arguments
    )


def _list(_: argparse.Namespace) -> None:
    from nnssl_ext.study.decathlon.tasks import tasks_table

    print(tasks_table())


def _fetch(arguments: argparse.Namespace) -> None:
    from nnssl_ext.study.decathlon.tasks import fetch_task, find_task

    tasks = [find_task(word) for word in arguments.tasks]
    if len(tasks) > 1 and (arguments.url or arguments.md5):
        raise UserError("--url and --md5 are about one task's file. Fetch the tasks one by one")
    root = Path(arguments.o)
    if not root.is_dir():
        check_writable(root, "-o")
        root.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        print(fetch_task(task, root, arguments.url, arguments.md5))


def _convert(arguments: argparse.Namespace) -> None:
    import tempfile

    from nnssl_ext.study.decathlon.tasks import convert_task, dataset_of, task_of_path, unpack

    raw = named_folder("nnUNet_raw")
    check_writable(raw, "nnUNet_raw")
    raw.mkdir(parents=True, exist_ok=True)
    for path in arguments.tasks:
        task = task_of_path(path)
        target = raw / dataset_of(task)
        if target.exists():
            raise UserError(f"{target} is there already. Remove it to convert {task} again")
        if others := same_number(target.name):
            raise UserError(
                f"{target.name} cannot be made: its number is taken by {', '.join(others)}. Rename or remove that"
            )
        with tempfile.TemporaryDirectory(dir=raw, prefix=".nnssl_ext_") as folder:
            scratch = Path(folder)
            source = unpack(path, task, scratch) if path.is_file() else path.absolute()
            print(convert_task(source, raw, scratch, test_images=True, processes=arguments.np))


def _predict(arguments: argparse.Namespace) -> None:
    from nnssl_ext.external_trainers import trainer_folders
    from nnssl_ext.study.decathlon.tasks import find_task, run_stock

    task = find_task(arguments.task)
    images = named_folder("nnUNet_raw") / task.dataset / "imagesTs"
    if not images.is_dir() or not any(images.glob("*.nii.gz")):
        raise UserError(f"no test images in {images}. nnssl_ext msd convert makes them from a task with imagesTs")
    model = named_folder("nnUNet_results") / task.dataset / f"{arguments.tr}__{arguments.p}__{arguments.c}"
    absent = [fold for fold in arguments.f if not (model / f"fold_{fold}" / "checkpoint_final.pth").is_file()]
    if absent:
        raise UserError(f"{model} has no finished fold {', '.join(absent)}. Train it, or name the folds with -f")
    words = ["nnUNetv2_predict", "-d", str(task.number), "-i", str(images), "-o", arguments.o, "-c", arguments.c]
    words += ["-p", arguments.p, "-tr", arguments.tr, "-f", *arguments.f, "-device", arguments.device]
    words += ["--continue_prediction", *(["--disable_tta"] if arguments.disable_tta else [])]
    _check_predictor(Path(arguments.o), model, arguments)
    _remove_torn(Path(arguments.o))
    run_stock(words, f"could not predict {task.folder}", {"nnUNet_extTrainer": trainer_folders()}, show=True)


def _check_predictor(folder: Path, model: Path, arguments: argparse.Namespace) -> None:
    """Note the predicting model, and refuse another one."""
    from nnssl_ext.recipe import read_json, write_json

    files = [model / f"fold_{fold}" / "checkpoint_final.pth" for fold in arguments.f]
    own = {"mirroring": not arguments.disable_tta, "checkpoints": {str(f): f.stat().st_mtime_ns for f in files}}
    note = folder / "nnssl_ext_predictor.json"
    known = read_json(note) if note.is_file() else own
    if known != own or (not note.is_file() and any(folder.glob("*.nii.gz"))):
        raise UserError(f"{folder} holds predictions of another model, or of other folds. Name another -o or empty it")
    check_writable(folder, "-o")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(own, note)


def _remove_torn(folder: Path) -> None:
    """Remove what a killed call left half-written. It is among the newest files."""
    from nnssl_ext.foreign import nifti_problem

    for path in sorted(folder.glob("*.nii.gz"), key=lambda path: path.stat().st_mtime)[-MOST_AT_A_TIME:]:
        if nifti_problem(path, quick=True):
            path.unlink()


def _submit(arguments: argparse.Namespace) -> None:
    from nnssl_ext.study.decathlon.submission import checked_files, write_archive
    from nnssl_ext.study.decathlon.tasks import TASKS, find_task

    if arguments.o.suffix != ".zip":
        raise UserError(f"-o {arguments.o}: the archive is a .zip")
    predictions = {}
    for word in arguments.predictions:
        name, _, folder = word.partition("=")
        task = find_task(name)
        if not Path(folder).is_dir() or task.folder in predictions:
            raise UserError(f"expected each task once as TASK=FOLDER with its predictions, got '{word}'")
        raw = named_folder("nnUNet_raw") / task.dataset
        predictions[task.folder] = Path(folder), raw
    checked = {name: checked_files(name, *predictions[name]) for name in sorted(predictions)}
    cases = write_archive(checked, arguments.o)
    published = sum(task.test for task in TASKS if task.folder in predictions)
    print(f"{arguments.o}: {len(predictions)} tasks, {cases} cases")
    if cases != published:
        print(f"note: {published} test cases of these tasks are published", file=sys.stderr)
    if len(predictions) < len(TASKS):
        print(f"note: the site evaluates archives of all {len(TASKS)} tasks", file=sys.stderr)
