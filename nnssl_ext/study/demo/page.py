"""The page of a demonstration: scratch against pretrained, once each."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK
import torch

from nnssl_ext.environment import cores
from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.recipe import read_json
from nnssl_ext.study import pictures
from nnssl_ext.study.demo.demo import Demo
from nnssl_ext.study.page import Page, Section, Table, render
from nnssl_ext.study.results import case_dice, training_log
from nnssl_ext.training.pretraining.state import versions

ARMS = ("scratch", "pretrained")


def write_page(demo: Demo) -> Path:
    """The page of a finished demonstration."""
    dataset_json = read_json(demo.preprocessed / "dataset.json")
    dice = {arm: case_dice(demo.results(arm) / "validation", dataset_json) for arm in ARMS}
    table = dice_table(dice)
    splits = read_json(demo.preprocessed / "splits_final.json", list)
    means = {arm: frame.groupby("organ")["dice"].mean().mean() for arm, frame in dice.items()}
    difference = 100 * (means["pretrained"] - means["scratch"])
    method = METHODS[demo.method].title
    test, labelled, seen = len(splits[0]["val"]), len(splits[0]["train"]), len(splits[1]["train"])
    answer = (
        f"Mean Dice on {test} test cases after fine-tuning on {labelled} labelled cases: {means['scratch']:.3f} from "
        f"scratch, {means['pretrained']:.3f} after {method} on {seen} images without labels ({difference:+.1f} points)."
    )
    caution = (
        "One run of each arm on a deliberately small network: this shows that the pipeline works and what it writes. "
        "It is no evidence for or against pretraining; differences of several points between two runs are ordinary."
    )
    sections = [
        Section("Dice per class", table=table, images=[pictures.bars(_by_class(dice))]),
        Section("Training", images=[_curves(demo)]),
        Section(
            "Test cases",
            ["The best, the median and the worst case of the pretrained arm, in the planes with most labelled voxels."],
            images=[pictures.slices(_overlays(demo, dice))],
        ),
        _what_was_run(demo),
        _on_ones_own_data(demo),
    ]
    subtitle = f"nnssl_ext on {demo.source.title}, {method}, {demo.device}"
    page = Page("Pretraining for nnU-Net, end to end", subtitle, [answer], caution, sections)
    return render(demo.output / "demo.html", page)


def dice_table(dice: dict[str, pd.DataFrame]) -> Table:
    """Mean Dice per class and arm, the difference in points, and how many cases have the class."""
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


def _curves(demo: Demo) -> bytes:
    pretraining = training_log(demo.weights)
    readable = METHODS[demo.method].readable
    logs = {arm: training_log(demo.results(arm) / "checkpoint_final.pth") for arm in ARMS}
    return pictures.curves(
        [
            (
                "Pretraining: objective",
                "loss",
                {"training": pretraining["train_losses"], "validation": pretraining["val_losses"]},
            ),
            (f"Pretraining: {readable.title}", "", {"validation": pretraining[f"val_{readable.key}"]}),
            (
                "Fine-tuning: Dice on validation patches",
                "Dice",
                {arm: log["mean_fg_dice"] for arm, log in logs.items()},
            ),
        ]
    )


def _overlays(demo: Demo, dice: dict[str, pd.DataFrame]) -> list[pictures.Overlay]:
    means = dice["pretrained"].groupby("case")["dice"].mean().sort_values(ascending=False)
    chosen = {"best": means.index[0], "median": means.index[len(means) // 2], "worst": means.index[-1]}
    overlays = []
    for title, name in chosen.items():
        case = str(name).split(".")[0]
        image = _read(demo.raw / "imagesTr" / str(name).replace(case, f"{case}_0000", 1))
        outlines = {"truth": _read(demo.raw / "labelsTr" / str(name))}
        for arm in ARMS:
            outlines[arm] = _read(demo.results(arm) / "validation" / str(name))
        overlays.append(pictures.Overlay(f"{title}: {case} ({means[name]:.2f})", image, outlines))
    return overlays


def _read(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def _what_was_run(demo: Demo) -> Section:
    records = demo.chain.records()
    rows = [[record["title"], f"{record['seconds']:.0f}"] for record in records]
    rows.append(["together", f"{sum(record['seconds'] for record in records):.0f}"])
    device = torch.cuda.get_device_name() if demo.device == "cuda" else f"{cores()} CPU cores"
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    return Section(
        "What was run",
        [f"{platform.system()} {platform.machine()}, {device}; {made}. Everything is in {demo.output}."],
        Table(["step", "seconds"], rows, total=True),
        code="\n".join(record["command"] for record in records if record["command"]),
    )


def _on_ones_own_data(demo: Demo) -> Section:
    trainer = TRAINERS[demo.method]
    weights = f"$nnUNet_results/DATASET/{trainer}__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth"
    lines = [
        'export nnUNet_extTrainer="$(nnssl_ext trainers)"',
        "nnUNetv2_plan_and_preprocess -d NUMBER -c 3d_fullres",
        f"nnUNetv2_train NUMBER 3d_fullres 0 -tr {trainer}",
        f"nnUNetv2_train NUMBER 3d_fullres 0 -pretrained_weights {weights}",
    ]
    text = (
        "With the data set's own network and full length. Fold 0 pretrains on fold 0's training cases alone, so the "
        "Dice on its validation cases can be believed."
    )
    return Section("On your own data", [text], code="\n".join(lines))
