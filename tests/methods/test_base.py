from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus

from nnssl_ext.methods import METHODS, DataGeometry
from nnssl_ext.networks.backbone import backbone_of
from tests.methods.helpers import CASE, views_of, write_cases

#: Methods that use the decoder, with settings under which they do.
WHOLE: dict[str, dict[str, Any]] = {
    "volume_fusion": {},
    "models_genesis": {},
    "masked_autoencoder": {"drop_masked_tokens": False},
    "rotation": {"reconstruction": 1.0},
}


@pytest.mark.parametrize("name", WHOLE)
def test_primus_pretrains_on_crops_of_another_size_than_the_plans(tmp_path: Path, name: str) -> None:
    """Rotation takes a cube wherever the plan's patch is none, and crop_size changes the others."""
    method = METHODS[name]
    settings = replace(method.Settings(), **WHOLE[name])
    size = (16, 16, 24) if name == "rotation" else (16, 16, 16)
    geometry = DataGeometry(size, (1.0, 1.0, 1.0), 2, ((8, 8, 8),), CASE)
    outputs = method.output_channels(settings, geometry) or 3
    network = Primus(2, 72, (8, 8, 8), outputs, eva_depth=1, eva_numheads=6, input_shape=(16, 16, 24))
    objective = method(backbone_of(network), settings, geometry)
    views = views_of(write_cases(tmp_path), objective, [0, 1])
    assert views["image"].shape[-3:] == (16, 16, 16)
    objective(views)["loss"].sum().backward()
    decoder = network.up_projection.parameters()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in decoder if parameter.ndim > 1)
    objective.eval()
    with torch.no_grad():
        assert objective.picture(views_of(tmp_path, objective, [0]))
