import json
import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from benchmarks import cards, loader, measure, memory, startup, step, views
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.workload import DATA, write_cases
from nnssl_ext.data.crops import Crop, CropDataset, CropRequest
from nnssl_ext.data.index import CaseIndex
from tests.conftest import REPOSITORY

TOOLS = {"__init__", "__main__", "measure", "workload", "soak_runs", "checkout"}


def test_every_benchmark_is_listed() -> None:
    assert set(BENCHMARKS) == {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")} - TOOLS


def test_an_unknown_name_is_one_line_and_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "laoder"])
    with pytest.raises(SystemExit, match="unknown benchmark 'laoder'\nusage: python -m benchmarks NAME"):
        main()


def test_functions_take_turns_and_warm_ups_do_not_count() -> None:
    called: list[str] = []
    turns = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    costs = measure.in_turns(turns, 3, warm_up=2)
    assert called == ["a", "b"] * 5
    assert {name: len(values) for name, values in costs.items()} == {"a": 3, "b": 3}
    assert all(cost.cpu >= 0 and cost.wall > 0 for cost in costs["a"])


def test_a_figure_shows_its_median_and_range() -> None:
    assert str(measure.Figure((3.0, 1.0, 2.0), 1)) == "2.0 (1.0 to 3.0)"
    assert str(measure.Figure((1234.5,), 0)) == "1,234"
    costs = [measure.Cost(2.0, 4.0), measure.Cost(1.0, 1.0)]
    assert measure.ratios(costs, [measure.Cost(1.0, 2.0)] * 2).values == (2.0, 1.0)
    assert measure.rate(costs, 8, wall=True).values == (2.0, 8.0)


def test_alone_reads_the_very_boxes_of_the_samples(tmp_path: Path) -> None:
    write_cases(tmp_path / DATA, (24, 20, 28), 2, [16, 16, 16])
    index = CaseIndex.build(tmp_path / DATA, workers=0, show_progress=False)
    dataset = CropDataset(index, index.cases, CropRequest((Crop((12, 10, 14), loader.TURNED),)), seed=0)
    boxes = loader.boxes_of(dataset, 5)
    assert len(boxes) == 5
    for sample, (path, key) in enumerate(boxes):
        box = dataset[sample].boxes[0]
        assert Path(path).stem == box.case
        assert [s.stop - s.start for s in key[1:]] == list(box.data.shape[1:])


def test_loader_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--shape",
        "24",
        "24",
        "24",
        "--edges",
        "12",
        "--samples",
        "2",
        "--repeats",
        "2",
        "--workers",
        "0",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["loader", *words])
    loader.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["crop"] for row in rows] == ["12^3 straight", "12^3 turned"]
    assert all(len(row["ratio"]) == 2 and min(row["ratio"]) > 0 for row in rows)


def test_memory_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["memory", "--edge", "64", "--methods", "rotation", "--json"])
    memory.main()
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["method"] == "Rotation"
    assert row["at this batch"][0] > 2 * row["kept a sample"][0] > 0


def test_startup_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["startup", "--cases", "9", "--repeats", "2", "--json"])
    # a start of its own takes ten seconds
    monkeypatch.setattr(startup, "measure", lambda root: {"checks": 0.5, "first batch": 1.0, "memory": 10.0})
    startup.main()
    made, there = json.loads(capsys.readouterr().out)["rows"]
    assert (made["index"], there["index"]) == ("made", "there")
    assert (len(made["first batch, s"]), len(there["first batch, s"])) == (1, 2)


def test_step_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rotation", "--plan", "hippocampus", "--batch", "1", "--repeats", "1", "--workers", "0", "--json"]
    monkeypatch.setattr(sys, "argv", ["step", *words])
    step.main()
    out = capsys.readouterr().out
    (row,) = json.loads(out[out.index("{\n") :])["rows"]
    assert row["CPU s a step"][0] > 0


def test_each_view_and_each_list_runs(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    for view in views.each(24, cpu).values():
        view()
    write_cases(tmp_path / DATA, (48, 48, 48), 2, [32, 32, 32])
    index = CaseIndex.build(tmp_path / DATA, workers=0, show_progress=False)
    run = views.lists(32, index, cpu, 1)
    assert {"VolumeFusion, equal list", "VolumeFusion", "Masked autoencoder"} <= set(run)
    run["VolumeFusion, equal list"]()


def test_the_equal_list_is_nnunets() -> None:
    method = views.build("volume_fusion", 32, views.equal_list())
    looks = method.settings.intensity
    stock = nnUNetTrainer.get_training_transforms((32, 32, 32), (0.0, 0.0), None, (0, 1, 2), False)
    chances = dict.fromkeys(("noise", "blur", "brightness", "contrast", "low_resolution", "gamma"), 0.0)
    for chosen in stock.transforms:
        kind = type(getattr(chosen, "transform", chosen)).__name__.lower().replace("lowres", "low_res")
        for name in chances:
            if name.replace("_", "") in kind.replace("_", ""):
                chances[name] += chosen.apply_probability * getattr(chosen.transform, "p_per_channel", 1)
    assert {name: getattr(looks, f"{name}_probability") for name in chances} == pytest.approx(chances)
    assert method.settings.flip == 0.5


def test_cards_fit_more_the_larger_they_are() -> None:
    small, large = (cards.fitting("vit_small", "rotation", (edge,) * 3, False) for edge in (32, 64))
    assert 0 < small[0] < small[1] < small[2]
    assert all(few < many for few, many in zip(large, small, strict=True))
