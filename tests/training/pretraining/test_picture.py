"""pretext.png: how panels are laid out, when it is drawn, and that it never ends a run."""

import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from nnssl_ext.data.crops import CropBatch
from nnssl_ext.methods import METHODS
from nnssl_ext.methods.panels import Panel
from nnssl_ext.training.pretraining.picture import EMPTY, GAP, SPACE, TILE, PretextPicture, compose, draw
from nnssl_ext.views.random import VALIDATION, VIEWS
from nnssl_ext.views.spatial import SourceBox
from tests.support.runs import Data, pretrain, trainer_for


def block(canvas: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    return canvas[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]


def test_a_volume_has_three_planes_in_millimeters() -> None:
    volume = torch.zeros(4, 8, 16)
    volume[2] = 1.0  # the axial plane in the middle
    canvas, ((left, top, title),) = compose([[Panel("a", volume)]], (4.0, 1.0, 1.0))
    assert (left, title) == (GAP, "a")
    shown = canvas[top:, left : left + TILE]
    rows = np.flatnonzero((shown != 1).any((1, 2)))
    # the longest edge, 16 mm, has TILE pixels: 8 x 16 mm, then 16 x 16 mm, then 16 x 8 mm
    axial = canvas[np.flatnonzero((canvas[:, left + TILE + SPACE] == 0).all(1))[0] :, left:]
    np.testing.assert_array_equal(block(axial, (0, 0), (TILE // 2, TILE)), 1.0)
    coronal = block(axial, (0, TILE + SPACE), (TILE, TILE))
    assert set(np.unique(coronal)) == {0.0, 1.0}
    assert (coronal[:, 0, 0] == 1).sum() == TILE // 4
    sagittal = block(axial, (0, 2 * (TILE + SPACE)), (TILE, TILE // 2))
    assert set(np.unique(sagittal)) == {0.0, 1.0}
    assert rows.size == 0  # all of the first plane is white


def test_one_window_for_a_row_and_colors_for_what_is_empty() -> None:
    dark, bright = torch.zeros(4, 4), torch.full((4, 4), 10.0)
    bright[0] = torch.nan
    canvas, titles = compose([[Panel("dark", dark), Panel("bright", bright)]], (1.0, 1.0, 1.0))
    pixels = {tuple(color) for color in canvas.reshape(-1, 3)}
    assert pixels == {(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), EMPTY}
    assert [left for left, _, _ in titles] == [GAP, 2 * GAP + TILE]


@pytest.mark.parametrize(
    "panel",
    [
        Panel("levels", torch.tensor([[0, 1], [2, 4]]), "levels"),
        Panel("colors", torch.rand(3, 4, 4, 4), "colors"),
        Panel("constant", torch.zeros(4, 4, 4)),
        Panel("empty\nof two lines", torch.full((4, 4), torch.nan)),
        Panel("no level", torch.full((4, 4, 4), torch.nan), "levels"),
        Panel("half", torch.rand(4, 4, dtype=torch.bfloat16)),
        Panel("a title that is longer than a single tile of the picture", torch.rand(1, 2, 2)),
    ],
    ids=lambda panel: panel.title,
)
def test_any_panel_is_drawn(tmp_path: Path, panel: Panel) -> None:
    file = tmp_path / "pretext.png"
    draw([[panel, panel], [panel]], "title", (2.0, 1.0, 1.0), file)
    image = matplotlib.image.imread(file)
    canvas, _ = compose([[panel, panel], [panel]], (2.0, 1.0, 1.0))
    assert image.shape[:2] == canvas.shape[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["pretext.png"]


def drawn_epochs(tmp_path: Path, every: int, epochs: int) -> list[int]:
    file = tmp_path / "pretext.png"
    picture, drawn = PretextPicture(file, every, epochs, pytest.fail), []
    picture.keep(CropBatch([7, 8], [[SourceBox(torch.rand(1, 4, 4, 4), np.eye(3), np.ones(3), "c")] * 2]), 1)
    for epoch in range(epochs):
        picture.update(epoch, "title", (1.0, 1.0, 1.0), lambda batch: [[Panel("a", batch.boxes[0][0].data[0])]])
        if file.exists():
            drawn.append(epoch)
            file.unlink()
    return drawn


@pytest.mark.parametrize(
    ("every", "epochs", "drawn"), [(0, 3, []), (1, 3, [0, 1, 2]), (2, 4, [0, 2, 3]), (10, 12, [0, 10, 11])]
)
def test_it_is_drawn_first_every_few_epochs_and_last(tmp_path: Path, every: int, epochs: int, drawn: list[int]) -> None:
    assert drawn_epochs(tmp_path, every, epochs) == drawn


def test_the_first_samples_of_the_first_batch_are_kept() -> None:
    picture = PretextPicture(Path("pretext.png"), 1, 2, pytest.fail)
    data = torch.rand(1, 4, 4, 4)
    original = data.clone()
    for first in (5, 0):
        boxes = [[SourceBox(data, np.eye(3), np.ones(3), f"case {first + n}") for n in range(3)] for _ in range(2)]
        picture.keep(CropBatch([first, first + 1, first + 2], boxes), 2)
    data.zero_()
    assert picture.batch is not None
    assert picture.batch.indices == [5, 6]
    assert [[box.case for box in row] for row in picture.batch.boxes] == [["case 5", "case 6"]] * 2
    assert torch.equal(picture.batch.boxes[1][0].data, original)


def test_a_picture_that_cannot_be_drawn_ends_no_run(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 1, "pretext_picture_every": 1})

    def broken(*_: object) -> None:
        raise ZeroDivisionError("no such picture")

    monkeypatch.setattr(METHODS["volume_fusion"], "picture", broken)
    fold = pretrain(environment, "plain", "run")
    log = next(fold.glob("training_log*")).read_text()
    assert "WARNING: pretext.png could not be drawn: ZeroDivisionError: no such picture" in log
    assert (fold / "checkpoint_final.pth").is_file()
    assert not list(fold.glob(".*.tmp"))


def test_it_shows_the_first_validation_sample(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are those of the first sample's views, and take well under a second."""
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 2, "pretext_picture_every": 1})
    trainer, rows = trainer_for("plain", "run"), []
    monkeypatch.setattr("nnssl_ext.training.pretraining.picture.draw", lambda found, *_: rows.append(found))
    trainer.run_training()
    assert len(rows) == 2
    batch = next(iter(trainer.get_dataloaders()[1]))
    views = trainer._views(batch, VALIDATION + VIEWS)
    for found in rows:
        assert torch.equal(found[0][0].data, views["image"][0, 0])
    start = time.perf_counter()
    draw(rows[0], "title", (1.0, 1.0, 1.0), trainer.folder.path / "pretext.png")
    assert time.perf_counter() - start < 5  # about 0.1 s alone
