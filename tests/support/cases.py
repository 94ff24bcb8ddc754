"""Small preprocessed cases in a folder."""

from pathlib import Path

from nnssl_ext.data.crops import Crop, CropDataset, CropRequest
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.views.spatial import SpatialRange

TURNING = SpatialRange((1.0, 1.0, 1.0), flip=0.5, rot90=0.5, affine=0.5, rotation=20, zoom=(0.8, 1.2))


def dataset(folder: Path, spatial: SpatialRange = TURNING, **options: int) -> CropDataset:
    index = CaseIndex.build(folder)
    size = (16, 16, 16)
    request = CropRequest((Crop(size, spatial), Crop(size, spatial, other_case=True)))
    return CropDataset(index, index.cases, request, options.get("seed", 0), options.get("stream", 0))
