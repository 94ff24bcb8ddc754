import pytest
import torch

from nnssl_ext.methods.dino_health import sign_of_collapse, told_cells
from nnssl_ext.methods.dino_settings import DINOSettings

HEALTHY = {
    "samples": 50.0,
    "image_information": 0.001,  # of a small batch for long; cells say enough
    "cell_information": 0.5,
    "image_entropy": 0.999,
    "cell_entropy": 0.9,
    "effective_rank": 20.0,
    "off_diagonal_cosine": 0.9,
}


@pytest.mark.parametrize(
    ("changed", "sign"),
    [
        ({}, ""),
        ({"cell_information": 0.001}, "targets are uniform whatever it sees"),
        ({"cell_information": 0.001, "image_entropy": 0.1, "cell_entropy": 0.2}, "the same whatever it sees"),
        ({"effective_rank": 1.1}, "features of all images are alike"),
        ({"off_diagonal_cosine": 0.99999}, "features of all images are alike"),
        ({"samples": 2.0, "cell_information": 0.0}, ""),
    ],
)
def test_signs(changed: dict[str, float], sign: str) -> None:
    found = sign_of_collapse({**HEALTHY, **changed}, DINOSettings())
    assert sign in found
    assert bool(found) == bool(sign)


def test_told_cells_are_compared_at_their_place() -> None:
    # what a cell shows is told by its view's direction, where it lies by its place's, which is larger
    views, places = torch.eye(6)[:3], torch.eye(6)[3:5]
    cells = views[:, None] + 5 * places
    hidden = torch.ones(3, 2, dtype=torch.bool)
    assert told_cells(cells, cells, hidden) == 1
    only_places = (5 * places).expand(3, -1, -1)
    assert told_cells(only_places, cells, hidden) == pytest.approx(1 / 3)
    assert told_cells(cells.roll(1, 0), cells, hidden) == 0
    # cells that are seen do not count
    hidden[1:] = False
    mixed = torch.cat([cells[:1], cells[1:].flip(0)])
    assert told_cells(mixed, cells, hidden) == 1
    assert told_cells(cells, cells, hidden & False) == 0
