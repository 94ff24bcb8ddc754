"""Draw the pictures of the README from committed numbers: ``make figures``."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import FancyBboxPatch

from nnssl_ext.study.analysis import count
from nnssl_ext.study.pictures import DPI, forest
from nnssl_ext.study.statistics import Effect

DOCS = Path(__file__).resolve().parent
#: Names of targets, where the data set's says little.
TARGETS = {"EMIDEC": "infarcts", "ACDC": "hearts", "MICCAI 2012 brains": "deep brain"}


def claims() -> pd.DataFrame:
    """Read the table of all claims."""
    return pd.read_csv(DOCS / "evidence" / "claims.csv", dtype={"labels": str})


def draw_results(path: Path) -> None:
    """Draw the README's differences as a forest plot."""
    rows = []
    for _, row in claims().dropna(subset="readme").sort_values("readme").iterrows():
        budget = f"{count(int(row['labels'].split()[0]), 'label')}, {row['finetuning steps']} steps"
        against = re.sub(r", (both at rate|still rising)[^,]*", "", row["compared with"]).replace(" with ", ", ")
        name = f"{TARGETS.get(row['data'], row['data'])}: {budget}\nvs {against}"
        effect = Effect(row["mean"] / 100, row["low"] / 100, row["high"] / 100, 0.0, int(row["pairs"]))
        rows.append((name, effect))
    path.write_bytes(forest(rows, "points of Dice above scratch", row_height=0.5))


def draw_pipeline(path: Path) -> None:
    """Draw the steps from unlabeled cases to a fine-tuned network."""
    figure, axis = plt.subplots(figsize=(8.2, 1.9), constrained_layout=True)
    axis.set(xlim=(0, 100), ylim=(3, 22))
    axis.set_axis_off()
    boxes = [
        (0.3, 18, "your nnU-Net\ndata set", "labels not read", "#e8eef7"),
        (22.5, 24, "nnUNetv2_train\n-tr nnsslTrainer_X", "pretrain", "#fbe9e4"),
        (51, 19.5, "checkpoint_final\n.pth", "an ordinary\nnnU-Net checkpoint", "#e8eef7"),
        (74.5, 25.2, "nnUNetv2_train\n-pretrained_weights", "fine-tune on few labels", "#e4f2e7"),
    ]
    for left, width, title, note, color in boxes:
        style = "round,pad=0,rounding_size=1.2"
        axis.add_patch(FancyBboxPatch((left, 4), width, 17, boxstyle=style, fc=color, ec="#4c5566", lw=1))
        family = "monospace" if "nnUNetv2" in title or ".pth" in title else None
        size = 9.5
        axis.text(left + width / 2, 15, title, ha="center", va="center", fontsize=size, family=family, color="#1d2433")
        axis.text(left + width / 2, 7.5, note, ha="center", va="center", fontsize=9, color="#4c5566")
    for (left, width, *_), (target, *_) in pairwise(boxes):
        axis.annotate("", (target - 0.5, 12.5), (left + width + 0.5, 12.5), arrowprops={"arrowstyle": "->", "lw": 1.6})
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


if __name__ == "__main__":
    draw_pipeline(DOCS / "figures" / "pipeline.png")
    draw_results(DOCS / "figures" / "results.png")
