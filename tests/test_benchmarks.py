import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from benchmarks import cards, evidence_data, launches, loader, measure, memory, peers, startup, step, views
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.commands import Bench
from benchmarks.gpu.context import Context, NoTimeLeftError
from benchmarks.workload import DATA, write_cases
from nnssl_ext.data.crops import Crop, CropBatch, CropDataset, CropRequest
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.methods import METHODS
from nnssl_ext.recipe import read_json, write_json
from tests.conftest import REPOSITORY

TOOLS = {"__init__", "__main__", "measure", "workload", "soak_runs"}


def test_every_benchmark_is_listed() -> None:
    folder = REPOSITORY / "benchmarks"
    names = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__main__.py")}
    assert set(BENCHMARKS) == names - TOOLS


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
    words = "--shape 24 24 24 --edges 12 --samples 2 --repeats 2 --workers 0 --json"
    monkeypatch.setattr(sys, "argv", ["loader", *words.split()])
    loader.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["crop"] for row in rows] == ["12^3 straight", "12^3 turned"]
    assert all(len(row["ratio"]) == 2 and min(row["ratio"]) > 0 for row in rows)


def test_memory_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["memory", "--edge", "64", "--methods", "rotation", "--json"])
    memory.main()
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["method"] == "Rotation"
    assert row["Tflop"][0] > 0
    assert row["at this batch"][0] > 2 * row["kept a sample"][0] > 0


def test_startup_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["startup", "--cases", "9", "--repeats", "2", "--json"])
    # a start of its own takes ten seconds
    monkeypatch.setattr(startup, "measure", lambda root: {"checks": 0.5, "first batch": 1.0, "memory": 10.0})
    startup.main()
    made, there = json.loads(capsys.readouterr().out)["rows"]
    assert (made["index"], there["index"]) == ("made", "there")
    assert (len(made["first batch, s"]), len(there["first batch, s"])) == (1, 2)


@pytest.mark.integration
def test_step_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rotation", "--plan", "hippocampus", "--batch", "1", "--repeats", "1", "--workers", "0", "--json"]
    monkeypatch.setattr(sys, "argv", ["step", *words])
    monkeypatch.setenv("nnUNet_extTrainer", str(REPOSITORY / "trainers"))
    step.main()
    out = capsys.readouterr().out
    (row,) = json.loads(out[out.index("{\n") :])["rows"]
    assert row["CPU s a step"][0] > 0


def test_each_view_and_each_list_runs(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    found = views.each(24, cpu)
    assert {"mirror (cut)", "fusion", "noise, of a copy", "histogram, of a copy"} <= set(found)
    for view in found.values():
        view()
    write_cases(tmp_path / DATA, (48, 48, 48), 2, [32, 32, 32])
    index = CaseIndex.build(tmp_path / DATA, workers=0, show_progress=False)
    run = views.lists(32, index, cpu, 1)
    assert {"VolumeFusion", "Masked autoencoder"} <= set(run)
    run["VolumeFusion"]()


def test_sides_take_new_samples_in_every_repeat(tmp_path: Path) -> None:
    write_cases(tmp_path / DATA, (48, 48, 48), 2, [32, 32, 32])
    index = CaseIndex.build(tmp_path / DATA, workers=0, show_progress=False)
    sides = peers.volume_fusion(32, index, 2)
    seen: dict[str, list[int]] = {name: [] for name in sides}

    def noted(name: str, make: Callable[[CropBatch], object]) -> Callable[[CropBatch], object]:
        def call(batch: CropBatch) -> object:
            seen[name] += batch.indices
            return make(batch)

        return call

    for name, side in sides.items():
        side.make = noted(name, side.make)
    costs = peers.turns(sides, 2)
    assert [len(found) for found in costs.values()] == [2] * len(sides)
    assert seen["ours"] == seen["stock nnU-Net"] == list(range(12))


def test_stock_and_ours_make_the_same_kind_of_sample(tmp_path: Path) -> None:
    """Same shape, and both change about as much of a crop: no side does less work."""
    write_cases(tmp_path / DATA, (48, 48, 48), 2, [32, 32, 32])
    index = CaseIndex.build(tmp_path / DATA, workers=0, show_progress=False)
    sides = peers.volume_fusion(32, index, 1)
    sides["ours"].read(0)
    (batch,) = sides["ours"].ready
    ours, stock = sides["ours"].make(batch), sides["stock nnU-Net"].make(batch)
    assert ours["image"].shape == stock.shape == (2, 1, 32, 32, 32)  # type: ignore[index, attr-defined]
    assert torch.isfinite(stock).all()  # type: ignore[arg-type]


def test_the_equal_list_is_nnunets() -> None:
    method = views.build("volume_fusion", 32, peers.EQUAL_LIST)
    looks = method.settings.intensity
    chances: dict[str, float] = {}
    for chosen in peers.stock_transforms(32).transforms:
        transform = getattr(chosen, "transform", None)
        if transform is None:
            continue
        name = {
            "GaussianNoiseTransform": "noise",
            "GaussianBlurTransform": "blur",
            "MultiplicativeBrightnessTransform": "brightness",
            "ContrastTransform": "contrast",
            "SimulateLowResolutionTransform": "low_resolution",
            "GammaTransform": "inverted_gamma" if getattr(transform, "p_invert_image", 0) else "gamma",
        }[type(transform).__name__]
        chances[f"{name}_probability"] = chosen.apply_probability
        if name in ("blur", "low_resolution"):
            chances[f"{name}_channel_probability"] = transform.p_per_channel
        if name == "gamma":
            assert looks.retain_stats == (transform.p_retain_stats == 1)
    assert {name: getattr(looks, name) for name in chances} == pytest.approx(chances)
    used = {f"{kind.name}_probability" for kind in looks.in_use}
    assert used == {name for name in chances if "channel" not in name}
    assert method.settings.flip == 0.5


def test_cards_fit_more_the_larger_they_are() -> None:
    small, large = (cards.fitting("vit_small", "rotation", (edge,) * 3, False) for edge in (32, 64))
    assert 0 < small[0] < small[1] < small[2]
    assert all(few < many for few, many in zip(large, small, strict=True))


@pytest.mark.slow
@pytest.mark.integration
def test_the_gpu_check_runs_every_line_on_a_cpu(tmp_path: Path, quick_commands: None) -> None:
    """The very command of a GPU machine, with the smallest networks; no part and no row may fail."""
    words = ["gpu", "--device", "cpu", "--tiny", "--minutes", "10", "--output", str(tmp_path)]
    finished = subprocess.run(
        [sys.executable, "-Wignore", "-m", "benchmarks", *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        text=True,
        capture_output=True,
        timeout=700,
        check=False,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert finished.returncode == 0, f"{gpu.failures(results)}\n{finished.stdout}\n{finished.stderr}"
    parts = results["parts"]
    assert list(parts) == list(gpu.LIMITS)
    assert not [part for part, rows in parts.items() if "stopped" in rows or "ended early" in rows]
    assert {"copy", "matrix product, bfloat16"} <= set(parts["ceilings"])
    assert set(METHODS) <= set(parts["correct"])
    assert set(METHODS) <= set(parts["speed"])
    assert parts["correct"]["dino"]["float32"]["gradient"] < 1e-6
    assert parts["line"]["the network equals the file under every alias"]["tensors"] > 0
    assert parts["compile"]["rotation"]["recompilations"] == 0
    assert parts["memory"]["volume_fusion, GiB"]["estimated"] > 0
    assert parts["ranks"]["torchrun, one rank"]["weights, relative difference"] == 0


@pytest.mark.integration
def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path: Path) -> None:
    def fails(context: Context) -> None:
        with context.row("first") as row:
            row["value"] = 1 / 0
        with context.row("second") as row:
            row["value"] = 2
        raise RuntimeError("broken part")

    def hangs(context: Context) -> None:
        context.put("begun", {})
        time.sleep(60)

    results = {}
    for part, function in {"ceilings": fails, "line": hangs}.items():
        context = Context(part, tmp_path, tmp_path, "cpu", True, time.monotonic() + 3)
        results[part] = gpu.supervise(part, function, context)
    assert "ZeroDivisionError" in results["ceilings"]["first"]["failed"]
    assert results["ceilings"]["second"]["value"] == 2
    assert "broken part" in results["ceilings"]["failed"]
    assert results["line"]["begun"] == {}
    assert "the part's limit" in results["line"]["stopped"]
    assert gpu.failures({"parts": results}) == ["ceilings", "ceilings: first"]


@pytest.mark.integration
def test_a_part_whose_device_is_lost_goes_on_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.context.device_is_lost", lambda _: True)

    def loses(context: Context) -> None:
        for name in (name for name in ("first", "second", "third") if not context.has(name)):
            with context.row(name) as row:
                row["process"] = os.getpid()
                if name != "third":
                    raise RuntimeError("an illegal memory access was encountered")

    context = Context("speed", tmp_path, tmp_path, "cuda", True, time.monotonic() + 20)
    rows = gpu.supervise("speed", loses, context)
    assert len({rows[name]["process"] for name in ("first", "second", "third")}) == 3
    assert "failed" not in rows
    assert gpu.failures({"parts": {"speed": rows}}) == ["speed: first", "speed: second"]


def test_a_command_that_does_not_end_in_time_is_unfinished(tmp_path: Path) -> None:
    bench = Bench.__new__(Bench)
    bench.context = Context("line", tmp_path, tmp_path, "cpu", True, time.monotonic() + 5)
    bench.root, bench.variables = tmp_path, {}
    # our trainers end with status 0 when asked to
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)"
    with pytest.raises(NoTimeLeftError, match="did not end in time"), bench.context.row("command"):
        bench.run([sys.executable, "-c", code])
    assert bench.context.read()["command"] == {"unfinished": True}


def test_a_row_without_time_says_so(tmp_path: Path) -> None:
    context = Context("speed", tmp_path, tmp_path, "cpu", True, time.monotonic() + 1)
    with pytest.raises(NoTimeLeftError), context.row("large", seconds=100):
        raise AssertionError
    assert "It needs 100 s" in context.read()["large"]["left out"]


@pytest.fixture
def _counting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_n_proc_DA"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("nnUNet_extTrainer", str(REPOSITORY / "trainers"))


@pytest.mark.integration
@pytest.mark.usefixtures("_counting")
@pytest.mark.parametrize("method", METHODS)
def test_launches_outside_the_network_stay_few(method: str, tmp_path: Path) -> None:
    kernels = launches.count_step(method, tmp_path)
    found = {phase: sum(kernels.counts[phase].values()) for phase in launches.PHASES}
    assert min(found["views"], found["backward"], found["update"]) > 0
    slack = 1.02 if torch.__version__ < "2.7" else 1.0  # torch 2.6 issues a few more
    assert sum(found.values()) <= slack * launches.LIMITS[method], kernels.counts
    assert not kernels.waits


@pytest.mark.integration
@pytest.mark.usefixtures("_counting")
@pytest.mark.parametrize("method", METHODS)
def test_a_validation_copies_nothing_to_the_device_in_its_forward_pass(method: str, tmp_path: Path) -> None:
    """The compiler cannot trace pinned memory."""
    kernels = launches.count_step(method, tmp_path, validation=True)
    assert sum(kernels.counts["forward"].values()) > 0
    assert not kernels.counts["forward"]["upload"]


@pytest.mark.integration
@pytest.mark.usefixtures("_counting")
def test_a_compiled_objective_has_fewer_kernels(tmp_path: Path) -> None:
    forward, backward = launches.count_compiled("masked_autoencoder", tmp_path)
    assert 0 < backward <= forward <= 4  # 7 and 9 are issued one by one


def test_the_counter_tells_host_from_device_and_network_from_the_rest() -> None:
    kernels = launches.Kernels()
    layer = torch.nn.Linear(4, 4)
    layer.register_forward_pre_hook(kernels.enter)
    layer.register_forward_hook(kernels.leave, always_call=True)
    drawn = torch.from_numpy(np.ones((2, 4), np.float32))
    with launches.pretend(kernels):
        host = torch.from_numpy(np.ones((2, 4), np.float32)) + 1  # on the host: not counted
        assert (host.device.type, drawn.device.type) == ("cpu", "cuda")
        image = host.to(launches.GPU)  # one upload
        kernels.phase = "forward"
        loss = (layer(image) * 2).sum()  # two kernels outside the layer
        kernels.phase = "backward"
        loss.backward()
        assert loss.device.type == "cuda"
        float(loss.detach())  # a wait
    assert dict(kernels.counts["views"]) == {"upload": 1}
    assert dict(kernels.counts["forward"]) == {"mul": 1, "sum": 1}
    assert set(kernels.counts["backward"]) <= {"ones_like", "mul", "expand"}
    assert dict(kernels.waits) == {"backward: _local_scalar_dense": 1}


def test_evidence_data_cuts_around_the_labels_and_divides_no_patient(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    labels = np.zeros((4, 140, 200), dtype=np.uint8)
    labels[1:3, 0:20, 150:190] = 2
    image = np.arange(labels.size, dtype=np.float32).reshape(labels.shape)
    for name, array in (("labelsTr/patient001_frame01", labels), ("imagesTr/patient001_frame01_0000", image)):
        (source / name).parent.mkdir(parents=True)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), source / f"{name}.nii.gz")
    write_json({"file_ending": ".nii.gz"}, source / "dataset.json")
    evidence_data.cut(source, target)
    cut_labels = SimpleITK.ReadImage(target / "labelsTr" / "patient001_frame01.nii.gz")
    cut_image = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(target / "imagesTr" / "patient001_frame01_0000.nii.gz"))
    # the box ends at the image's edge where the labels lie closer to it than half its width
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(cut_labels), labels[:, :112, 88:])
    np.testing.assert_array_equal(cut_image, image[:, :112, 88:])
    assert cut_labels.GetOrigin() == (88, 0, 0)

    (target / "nnUNetPlans_3d_fullres").mkdir()
    for patient in range(1, 11):
        for suffix in ("01", "12", "01_seg"):
            (target / "nnUNetPlans_3d_fullres" / f"patient{patient:03d}_frame{suffix}.b2nd").touch()
    evidence_data.hold_out_patients(target)
    (split,) = read_json(target / "splits_final.json", list)
    assert split["val"] == [f"patient{patient:03d}_frame{frame}" for patient in (9, 10) for frame in ("01", "12")]
    assert len(split["train"]) == 16
    assert not {*split["train"]} & {*split["val"]}
