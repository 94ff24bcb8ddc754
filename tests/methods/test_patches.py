from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.methods import METHODS, DataGeometry
from nnssl_ext.networks.backbone import backbone_of
from nnssl_ext.views import layout
from nnssl_ext.views.spatial import SourceBox
from tests.methods.helpers import views_of
from tests.support.networks import network


@pytest.mark.parametrize("name", ["contrastive_predictive_coding", "jigsaw", "relative_patch_location"])
def test_no_patch_is_magnified_more_than_zoom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along no axis, though patches leave a voxel of the case for their shifts."""
    seen: list[float] = []

    def cut(boxes: list[SourceBox], *arguments: Any) -> Any:
        seen.extend(1 / np.diag(box.matrix).min() for box in boxes)
        return crop_batch(boxes, *arguments)

    crop_batch = layout.crop_batch
    monkeypatch.setattr(layout, "crop_batch", cut)
    largest = []
    for edge in (11, 14, 18, 20):
        case, folder = (20, edge, edge), tmp_path / f"{edge}"
        folder.mkdir()
        noise = np.random.default_rng(0).standard_normal((1, *case)).astype(np.float32)
        blosc2.asarray(noise, urlpath=str(folder / "c.b2nd"), mode="w")
        backbone = backbone_of(network("plain"))
        plan = DataGeometry((16, 16, 16), (1.0, 1.0, 1.0), 1, tuple(backbone.strides), case)
        try:
            method = METHODS[name](backbone, METHODS[name].Settings(), plan)
        except UserError:
            continue
        views_of(folder, method, [0])
        largest.append(max(seen))
        seen.clear()
    assert max(largest) <= 2 + 1e-9
    assert max(largest) > 1.5
