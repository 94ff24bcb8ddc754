"""Known sources: each has a short name, its facts, and a file of its published layout that can be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.transfer.known_sources import KNOWN_SOURCES
from nnssl_ext.transfer.read import read_source
from tests.conftest import REPOSITORY
from tests.datasets import make_plans
from tests.support.layouts import SMALL, encoder_layout, published_layout, random_weights
from tests.transfer.files import hub_folder, nnssl_file, plan, resnet18, spark_file, stock_file
from tests.transfer.helpers import noise, primus


def _mis_fm(folder: Path) -> None:
    weights = random_weights(published_layout(1, 2, SMALL, (2, 2, 4), 2))
    torch.save({"model_state_dict": weights, "iteration": 3, "valid_pred": 0.5}, folder / "pct.pt")


def _vit(folder: Path) -> None:
    encoder = {f"backbone.{name}": tensor for name, tensor in random_weights(encoder_layout(1, 16, 4, 2)).items()}
    torch.save({"teacher": encoder}, folder / "3dino_vit_weights.pth")


def _stu_net(folder: Path) -> None:
    """nnU-Net v1's dictionary; blocks of two convolutions with norms, and a third beside them."""
    layout = {
        f"conv_blocks_context.{stage}.0.{name}": shape
        for stage in range(2)
        for name, shape in (
            ("conv1.weight", (4, 1, 3, 3, 3)),
            ("norm1.weight", (4,)),
            ("conv3.weight", (4, 1, 1, 1, 1)),
        )
    }
    content = {
        "epoch": 4000,
        "state_dict": random_weights(layout),
        "optimizer_state_dict": None,
        "plot_stuff": ([0.1], [], []),
    }
    torch.save(content, folder / "small_ep4k.model")


def _vit_of_primus(folder: Path) -> None:
    weights = noise(primus()).state_dict()
    keys: dict[str, Any] = {"key_to_encoder": "eva", "key_to_stem": "down_projection", "key_to_lpe": "eva.pos_embed"}
    keys["pretrain_plan"] = {"configurations": {"noresample": {"patch_size": [8, 8, 8], "spacing": None}}}
    torch.save(
        {"network_weights": weights, "nnssl_adaptation_plan": plan("PrimusX", **keys)}, folder / "checkpoint_final.pth"
    )


#: Short name or its beginning -> writes a file of that layout with random values into a folder.
LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "openmind-resenc-s3d": lambda folder: spark_file(folder / "checkpoint_final.pth"),
    "openmind-resenc": lambda folder: hub_folder(folder / "hub"),
    "openmind-primus": lambda folder: nnssl_file(folder / "checkpoint_final.pth", "primus"),
    "nnfoundation-cnn": lambda folder: nnssl_file(folder / "checkpoint_final.pth", "residual"),
    "nnfoundation-vit": _vit_of_primus,
    "ssl3d": lambda folder: nnssl_file(folder / "ssl3d.pth", "residual"),
    "missing-piece-s3d": lambda folder: spark_file(folder / "checkpoint_final.pth"),
    "totalsegmentator": lambda folder: stock_file(folder / "checkpoint_final.pth", make_plans("plain"), "plain"),
    "stu-net": _stu_net,
    "mis-fm": _mis_fm,
    "3dino-vit": _vit,
    "cspr": lambda folder: torch.save({"state_dict": resnet18(4)}, folder / "resnet18.pth"),
}


@pytest.mark.parametrize("name", KNOWN_SOURCES)
def test_a_file_of_the_published_layout_is_read(name: str, tmp_path: Path) -> None:
    write = next(write for beginning, write in LAYOUTS.items() if name.startswith(beginning))
    write(tmp_path)
    (file,) = (path for path in tmp_path.rglob("*.*") if path.suffix in (".pth", ".pt", ".model"))
    weights = read_source(str(file)).weights
    assert weights
    assert all(tensor.is_floating_point() or tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize("name", KNOWN_SOURCES)
def test_a_short_name_is_a_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str, **_: Any) -> str:
        asked.append((repository, file))
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path))
    source = KNOWN_SOURCES[name]
    with pytest.raises(UserError) as error:
        read_source(name)
    if source.repository:
        assert asked == [(source.repository, source.file or "adaptation_plan.json")]
    else:
        assert source.address in str(error.value)
        assert asked == []


def test_the_command_lists_and_describes_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sources"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(KNOWN_SOURCES)
    assert main(["sources", *KNOWN_SOURCES]) == 0
    printed = capsys.readouterr().out
    for source in KNOWN_SOURCES.values():
        assert source.license in printed
        assert source.fits in printed
    with pytest.raises(UserError, match="Expected a known source, got 'absent'"):
        main(["sources", "absent"])


def test_the_page_holds_the_same_facts() -> None:
    page = (REPOSITORY / "docs" / "reference" / "sources.md").read_text()
    for name, source in KNOWN_SOURCES.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` "))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        shown = (source.what, source.data, source.modality, source.license, source.normalization, source.spacing)
        assert cells[1:] == [*shown, source.size, source.fits, source.tested, source.repository or source.address]


def test_every_fact_is_stated_or_marked_as_not_found() -> None:
    facts = {"what", "data", "modality", "license", "normalization", "spacing", "size", "fits", "tested", "address"}
    for source in KNOWN_SOURCES.values():
        assert set(vars(source)) == facts | {"repository", "file"}
        assert all(getattr(source, fact) for fact in facts)
