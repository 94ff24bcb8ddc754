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


def test_told_cells_counts_within_the_view() -> None:
    hidden = torch.zeros(2, 2, 4, dtype=torch.bool)
    hidden[0, 0, :3] = hidden[1, 1, 2:] = True
    row = hidden.flatten().nonzero()[:, 0]
    said = torch.eye(5)
    own = said[[0, 2, 1, 3, 0]]  # right, swapped, swapped, right, and a cell of the other sample: not a candidate
    views = {"hidden": hidden, "row": row, "owner": row // 8}
    found = told_cells(own, said, views, 2)
    assert found[0].tolist() == pytest.approx([1, 3, 1])
    assert found[1, 1:].tolist() == pytest.approx([2, 1])
    none = {"hidden": hidden & False, "row": row[:0], "owner": row[:0]}
    assert told_cells(own[:0], said[:0], none, 2).tolist() == [[0, 0, 0], [0, 0, 0]]
