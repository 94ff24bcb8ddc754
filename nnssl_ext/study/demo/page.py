"""Write the page of a demonstration."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK
import torch

from nnssl_ext.environment import cores
from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.provenance import versions
from nnssl_ext.recipe import read_json
from nnssl_ext.study import pictures
from nnssl_ext.study.demo.demo import METHOD, PLANS, STOCK_STEPS, Demo
from nnssl_ext.study.page import Page, Picture, Section, Table, render
from nnssl_ext.study.report import best_median_worst, case_tiles
from nnssl_ext.study.results import case_dice, training_log

ARMS = ("scratch", "pretrained")


def write_page(demo: Demo) -> Path:
    """Write the page of a finished demonstration."""
    dataset_json = read_json(demo.preprocessed / "dataset.json")
    dice = {arm: case_dice(demo.results(arm) / "validation", dataset_json) for arm in ARMS}
    splits = read_json(demo.preprocessed / "splits_final.json", list)
    test, labeled, seen = len(splits[0]["val"]), len(splits[0]["train"]), len(splits[1]["train"])
    method = METHODS[METHOD].title
    settings = read_json(demo.preprocessed / f"{PLANS}.json")["nnssl_ext"]
    steps = settings["epochs"] * settings["iterations_per_epoch"]
    finetuning = demo.lengths.finetuning_epochs * STOCK_STEPS
    notes = [
        f"{method} pretrained on {seen} images without labels for {steps:,} steps. Both arms were fine-tuned on "
        f"{labeled} labeled cases for {finetuning:,} steps and tested on {test} cases.",
        "One run of each arm on a small network: the page shows that the pipeline works. It is no evidence for or "
        "against pretraining. Two runs often differ by several points.",
        *([demo.lengths.caution] if demo.lengths.caution else []),
    ]
    sections = [
        Section("Test cases", tiles=_tiles(demo, dice)),
        Section(
            "Dice per class", ["Bars are means, dots are test cases."], plots=[Picture(pictures.bars(_by_class(dice)))]
        ),
        *_training(demo),
        *_pretext(demo),
        _commands_run(demo),
        _own_data(demo),
    ]
    subtitle = f"nnssl_ext on {demo.source.title}, {method}, {demo.device}"
    page = Page("Pretraining for nnU-Net, end to end", subtitle, dice_table(dice), sections, notes)
    return render(demo.output / "demo.html", page)


def dice_table(dice: dict[str, pd.DataFrame]) -> Table:
    """Compare mean Dice per class of both arms."""
    means = pd.DataFrame({arm: frame.groupby("organ", sort=False)["dice"].mean() for arm, frame in dice.items()})
    counts = dice["scratch"].dropna().groupby("organ")["dice"].size()
    rows = [
        [
            str(organ),
            str(counts.get(organ, 0)),
            f"{row.scratch:.3f}",
            f"{row.pretrained:.3f}",
            f"{100 * (row.pretrained - row.scratch):+.1f}",
        ]
        for organ, row in means.iterrows()
    ]
    total = means.mean()
    rows.append(
        [
            "mean of classes",
            "",
            f"{total.scratch:.3f}",
            f"{total.pretrained:.3f}",
            f"{100 * (total.pretrained - total.scratch):+.1f}",
        ]
    )
    return Table(["class", "test cases", "scratch", "pretrained", "difference (points)"], rows, total=True)


def _by_class(dice: dict[str, pd.DataFrame]) -> dict[str, dict[str, list[float]]]:
    organs = dice["scratch"]["organ"].unique()
    return {
        str(organ): {arm: frame.loc[frame["organ"] == organ, "dice"].tolist() for arm, frame in dice.items()}
        for organ in organs
    }


def _training(demo: Demo) -> list[Section]:
    """Draw what has more than one epoch."""
    log, readable = training_log(demo.weights), METHODS[METHOD].readable
    losses = {"training": log["train_losses"], "validation": log["val_losses"]}
    dice = {arm: training_log(demo.results(arm) / "checkpoint_final.pth")["mean_fg_dice"] for arm in ARMS}
    validation = {"validation": log[f"val_{readable.key}"]}
    shown: list[tuple[str, str, dict[str, list[float]]]] = [
        ("loss", "Pretraining: objective", losses),
        (readable.title, f"Pretraining: {readable.title}", validation),
        ("Dice", "Fine-tuning: Dice on validation patches", dice),
    ]
    plots = [
        Picture(pictures.curves(label, lines), title)
        for label, title, lines in shown
        if max(map(len, lines.values())) > 1
    ]
    return [Section("Training", plots=plots)] if plots else []


def _pretext(demo: Demo) -> list[Section]:
    """Show the pretraining's own picture, if there is one."""
    picture = demo.results("pretraining") / "pretext.png"
    if not picture.is_file():
        return []
    return [
        Section(
            "The pretraining task",
            ["One validation sample: input, target and prediction."],
            plots=[Picture(picture.read_bytes(), wide=True)],
        )
    ]


def _tiles(demo: Demo, dice: dict[str, pd.DataFrame]) -> list[tuple[str, list[Picture]]]:
    """Show the best, median and worst test case."""
    scores = {arm: frame.groupby("case")["dice"].mean() for arm, frame in dice.items()}
    order = scores["pretrained"].sort_values(ascending=False).index
    rows = []
    for title, name in best_median_worst(order):
        case = name.split(".")[0]
        image = _read(demo.raw / "imagesTr" / name.replace(case, f"{case}_0000", 1))
        truth = _read(demo.raw / "labelsTr" / name)
        labels = {arm: _read(demo.results(arm) / "validation" / name) for arm in ARMS}
        own = {arm: float(scores[arm][name]) for arm in ARMS}
        rows.append((f"{title} of the pretrained arm: {case}", case_tiles(image, truth, labels, own)))
    return rows


def _read(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def _commands_run(demo: Demo) -> Section:
    records = demo.chain.records()
    rows = [[record["title"], f"{record['seconds']:.0f}"] for record in records]
    rows.append(["together", f"{sum(record['seconds'] for record in records):.0f}"])
    device = torch.cuda.get_device_name() if demo.device == "cuda" else f"{cores()} CPU cores"
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    text = [f"{platform.system()} {platform.machine()}, {device}. {made}.", f"All files are in {demo.output}."]
    if demo.lengths.seconds_per_step:
        text.append(
            f"A step of the network took {demo.lengths.seconds_per_step:.3f} s. The lengths were chosen for "
            f"{demo.minutes:g} minutes."
        )
    commands = "\n".join(record["command"] for record in records if record["command"])
    return Section("Commands", text, Table(["step", "seconds"], rows, total=True), code=commands)


def _own_data(demo: Demo) -> Section:
    trainer = TRAINERS[METHOD]
    weights = f"$nnUNet_results/DATASET/{trainer}__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth"
    lines = [
        'export nnUNet_extTrainer="$(nnssl_ext trainers)"',
        "nnUNetv2_plan_and_preprocess -d NUMBER -c 3d_fullres",
        f"nnUNetv2_train NUMBER 3d_fullres 0 -tr {trainer}",
        f'nnUNetv2_train NUMBER 3d_fullres 0 -pretrained_weights "{weights}"',
    ]
    text = (
        "This takes the data set's own network and full length. Fold 0 pretrains on the training cases of fold 0 only, "
        "so that the Dice on its validation cases is sound."
    )
    return Section("Your own data", [text], code="\n".join(lines))
