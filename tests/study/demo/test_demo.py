"""The demonstration, made small: real stock commands from phantom to page."""

import os
import re
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.recipe import write_json
from nnssl_ext.study.demo.demo import LONG, Demo, Lengths, choose_lengths
from nnssl_ext.study.demo.demo import SHORT as SHORT_STOCK
from nnssl_ext.study.demo.page import dice_table, write_page
from nnssl_ext.study.demo.phantom import ORGANS, PhantomOptions
from nnssl_ext.study.demo.sources import PhantomSource
from nnssl_ext.study.page import Page, Section, Table, render
from tests.trainers import SHORT, short_trainer

TINY = [
    "epochs=2",
    "iterations_per_epoch=2",
    "validation_iterations=1",
    "architecture.features_base=4",
    "architecture.features_max=8",
    "configuration.patch_limit=16",
]


@pytest.mark.slow
@pytest.mark.integration
def test_from_nothing_to_a_page_and_again_in_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_commands: None
) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.setenv(name, "/nonexistent")  # the user's own folders are not touched
    variables = Demo._variables

    def with_short_trainer(self: Demo) -> dict[str, str]:
        found = variables(self)
        return {**found, "nnUNet_extTrainer": f"{found['nnUNet_extTrainer']}{os.pathsep}{short_trainer(tmp_path)}"}

    monkeypatch.setattr(Demo, "_variables", with_short_trainer)
    source = PhantomSource(PhantomOptions(cases=8, labeled=2, test=2, field_of_view=26.0))
    demo = Demo(tmp_path / "demo", source, minutes=2, settings=TINY)
    demo.output.mkdir()
    write_json(asdict(Lengths(2, SHORT)), demo.output / "lengths.json")
    with monkeypatch.context() as patch:
        # the first call is interrupted in its pretraining
        patch.setattr(Demo, "_pretraining_command", lambda self: ["false"])
        with pytest.raises(
            UserError, match=r"Step 'Pretrain with VolumeFusion' failed with status 1. Its log: .*\.txt"
        ):
            demo.run()
    demo = Demo(tmp_path / "demo", source, minutes=2, settings=TINY)
    capsys.readouterr()
    demo.run()
    page = write_page(demo)
    assert capsys.readouterr().out.count("done before") == 4
    text = page.read_text()
    for words in (
        *ORGANS,
        "from scratch",
        "The pretraining task",
        "VolumeFusion",
        "no evidence",
        "-pretrained_weights",
        "nnUNetv2_train 900",
    ):
        assert words in text
    assert text.count("data:image/png;base64,") == 4 + 2 * 3  # plots, and three tiles of each of two cases
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo", "short_trainer"]

    demo.run()
    write_page(demo)
    assert capsys.readouterr().out.count("done before") == 7  # it draws the page anew and nothing else


def test_pages_escape_what_they_are_told(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    table = Table([evil], [[evil]])
    section = Section(evil, [evil], table, code=evil)
    text = render(tmp_path / "page.html", Page(evil, evil, table, [section], [evil], [], [evil])).read_text()
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") >= 9


def test_table_counts_only_cases_that_have_the_class() -> None:
    def frame(values: list[float]) -> pd.DataFrame:
        return pd.DataFrame({"case": ["a", "b", "a", "b"], "organ": ["x", "x", "y", "y"], "dice": values})

    nan = float("nan")
    table = dice_table({"scratch": frame([0.5, 0.7, nan, 0.2]), "pretrained": frame([0.6, 0.8, nan, 0.4])})
    assert table.rows == [
        ["x", "2", "0.600", "0.700", "+10.0"],
        ["y", "1", "0.200", "0.400", "+20.0"],
        ["mean of classes", "", "0.400", "0.550", "+15.0"],
    ]


def test_lengths_fit_the_time() -> None:
    fast, slow, slowest = (choose_lengths(seconds, 8, 10, 200) for seconds in (0.03, 0.25, 1.0))
    assert (fast.finetuner, fast.pretraining_epochs, fast.patch_limit) == (LONG, 10, 0)
    assert slow.finetuner == SHORT_STOCK
    assert 1 <= slow.pretraining_epochs < 10
    assert slowest.patch_limit == 16
    assert "a step took 1.0 s. Crops and trainings are so short" in slowest.caution
    assert not fast.caution
    assert not slow.caution
    # never less than one epoch, however slow the machine is
    assert choose_lengths(60.0, 8, 10, 200).pretraining_epochs == 1


@pytest.mark.integration
def test_a_step_is_measured_before_lengths_are_chosen(tmp_path: Path, quick_commands: None) -> None:
    source = PhantomSource(PhantomOptions(cases=6, labeled=2, test=1, field_of_view=22.0))
    demo = Demo(tmp_path / "demo", source, minutes=2, settings=TINY)
    for step in demo.chain.steps[:4]:
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            (demo.output / name).mkdir(parents=True, exist_ok=True)
        type(demo.chain)(demo.output, demo.chain.variables, [step]).run()
    assert demo.lengths.seconds_per_step > 0
    assert (demo.preprocessed / "nnUNetPlans_demo.json").is_file()
