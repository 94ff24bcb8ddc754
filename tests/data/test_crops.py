import math
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnssl_ext.data.crops import Crop, CropDataset, CropRequest, body_center, collate, draw_center
from nnssl_ext.data.index import CaseIndex
from nnssl_ext.data.loader import Shard, SteadyLoader
from nnssl_ext.views.augmentations import IntensitySettings
from nnssl_ext.views.multicrop import ViewKind, look_at
from nnssl_ext.views.random import VALIDATION, VIEWS, BatchRandom
from nnssl_ext.views.spatial import SpatialRange, crop_box
from tests.support.cases import TURNING, dataset
from tests.support.looks import without_views

STILL = SpatialRange((1.0, 1.0, 1.0))


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_views_are_read_one_by_one_and_are_those_of_the_region(folder: Path, scale: float) -> None:
    index, size = CaseIndex.build(folder), (16, 16, 16)
    kinds = (
        ViewKind(2, (12, 12, 12), (0.5, 1.0), (0.5, 1.0), SpatialRange((1.0, 1.0, 1.0), flip=0.5, rot90=0.5)),
        ViewKind(3, (6, 6, 6), (0.2, 0.5), (0.2, 0.5), STILL),
    )
    crop = Crop(size, STILL, scale=scale, fit=True, views=kinds)
    data = CropDataset(index, index.cases, CropRequest((crop,)), seed=0)
    whole = CropDataset(index, index.cases, CropRequest((replace(crop, views=()),)), seed=0)
    sizes = [kind.size for kind in kinds for _ in range(kind.number)]
    batch = collate([data[n] for n in range(3)])
    assert len(batch.boxes) == 5
    for n in range(3):
        region = whole[n].boxes[0]
        inner = crop_box(region, size, torch.device("cpu"))[0]
        for row, edges in zip(batch.boxes, sizes, strict=True):
            box = row[n]
            assert box.case == region.case
            assert box.data[0].numel() <= math.prod(edges)
            view, inside = crop_box(box, edges, torch.device("cpu"))
            assert inside is None
            assert inner.amin() - 0.3 <= view.amin() <= view.amax() <= inner.amax() + 0.3
    looks = without_views(IntensitySettings)
    random = BatchRandom(0, VIEWS, batch.indices, torch.device("cpu"))
    views = look_at([row[b] for b in range(3) for row in batch.boxes[2:]], kinds[1], looks, random)
    assert views.shape == (3, 3, 1, 6, 6, 6)
    assert torch.equal(views[1, 2], crop_box(batch.boxes[4][1], (6, 6, 6), torch.device("cpu"))[0])


def test_every_case_comes_once_before_any_comes_again_and_partners_differ(folder: Path) -> None:
    data = dataset(folder)
    drawn = [data.draw_cases(sample) for sample in range(400)]
    for turn in range(100):
        assert len({own for own, _ in drawn[4 * turn : 4 * turn + 4]}) == 4
    assert all(own != other for own, other in drawn)
    pairs = Counter(drawn)
    assert len(pairs) == 12
    assert min(pairs.values()) > 15


def test_a_sample_is_a_pure_function_of_seed_stream_and_index(folder: Path) -> None:
    first, again = dataset(folder)[17], dataset(folder)[17]
    others = [dataset(folder, seed=1)[17], dataset(folder, stream=VALIDATION)[17], dataset(folder)[18]]
    for box, same in zip(first[1], again[1], strict=True):
        assert torch.equal(box.data, same.data)
        assert np.array_equal(box.matrix, same.matrix)
        assert np.array_equal(box.center, same.center)
    for other in others:
        assert not np.array_equal(first[1][0].center, other[1][0].center) or first[1][0].case != other[1][0].case


def test_a_crop_is_the_voxels_of_its_case(folder: Path) -> None:
    """Along each axis the crop is a run of the case's own voxels, with equal padding where the case is too small."""
    for sample in range(12):
        _, boxes, failure, _ = dataset(folder, STILL)[sample]
        assert not failure
        for box in boxes:
            crop, inside = crop_box(box, (16, 16, 16), torch.device("cpu"))
            whole = np.asarray(blosc2.open(str(folder / f"{box.case}.b2nd"))[:])
            padding = [max(0, 16 - n) for n in whole.shape[1:]]
            assert (inside is None) == (sum(padding) == 0)
            inside = torch.ones(1, 16, 16, 16).bool() if inside is None else inside
            assert int(inside.sum()) == np.prod([16 - p for p in padding])
            assert not crop[:, ~inside[0]].any()
            for axis, missing in enumerate(padding):
                there = inside[0].any(dim=tuple(a for a in range(3) if a != axis))
                before = int(torch.nonzero(there)[0])
                assert before in (missing // 2, missing - missing // 2)
            voxels = crop[:, inside[0]].numpy()
            assert np.isin(voxels, whole).all()


def test_only_the_box_is_read(folder: Path) -> None:
    for sample in range(20):
        boxes = dataset(folder, STILL)[sample].boxes
        for box in boxes:
            assert all(edge <= 16 for edge in box.data.shape[1:])


def test_crops_prefer_the_body() -> None:
    body = np.zeros((16, 16, 16), dtype=bool)
    body[:4, :4, :4] = True
    volume = np.array([64, 64, 64])
    shares = []
    for preferred in (body, np.ones_like(body)):
        generator = np.random.default_rng(0)
        lows = np.array([draw_center(generator, volume, (16, 16, 16), preferred) - 7.5 for _ in range(200)])
        shares.append((lows < 16).all(1).mean())
        assert lows.min() >= 0
        assert lows.max() <= 48
    assert shares[0] > 5 * shares[1]


def test_constant_crops_are_drawn_again(tmp_path: Path) -> None:
    image = np.zeros((1, 64, 8, 8), np.float32)
    image[:, 30:34] = np.random.default_rng(0).random((4, 8, 8))
    blosc2.asarray(image, urlpath=str(tmp_path / "thin.b2nd"), mode="w")
    index = CaseIndex.build(tmp_path)
    data = CropDataset(index, index.cases, CropRequest((Crop((8, 8, 8), STILL),)), 0)
    for sample in range(30):
        (box,) = data[sample][1]
        assert box.data.std() > 0


def test_a_case_that_breaks_while_training_is_named(folder: Path) -> None:
    data = dataset(folder)
    for path in folder.glob("*.b2nd"):
        path.unlink()
    batch = collate([data[0], data[1]])
    assert data.draw_cases(0)[0] in batch.failure
    assert str(folder) in batch.failure


def test_batches_do_not_depend_on_workers_or_ranks(folder: Path) -> None:
    data = dataset(folder)

    def read(shard: Shard, workers: int) -> list[tuple[list[int], list[float]]]:
        loader = SteadyLoader(data, shard, workers=workers, pin_memory=False, log=print, waiting=lambda: None)
        return [(batch.indices, [float(box.data.sum()) for box in batch.boxes[1]]) for batch in loader]

    here = read(Shard(2, 6, 3), 0)
    assert [indices for indices, _ in here] == [[6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17]]
    assert read(Shard(2, 6, 3), 2) == here
    shards = [read(Shard(2, 6, 3, rank, 2), 0) for rank in range(2)]
    for step, (indices, sums) in enumerate(here):
        together = dict(pair for shard in shards for pair in zip(*shard[step], strict=True))
        assert together == dict(zip(indices, sums, strict=True))
    assert len(Shard(2, 6, 3)) == 4


@pytest.mark.parametrize("spatial", [STILL, TURNING])
def test_a_fitting_crop_is_never_padded_and_keeps_its_shape(folder: Path, spatial: SpatialRange) -> None:
    """Cases of the folder are as thin as 9 voxels; the crop has 16, magnified twofold."""
    index = CaseIndex.build(folder)
    magnified = Crop((16, 20, 16), spatial, scale=0.5, fit=True)
    padded = Crop((16, 20, 16), spatial)
    scales = set()
    for sample in range(40):
        boxes = CropDataset(index, index.cases, CropRequest((magnified, padded)), 0)[sample][1]
        assert crop_box(boxes[0], magnified.size, torch.device("cpu"))[1] is None
        scales.add(round(float(np.abs(np.linalg.det(boxes[0].matrix))) ** (1 / 3), 3))
        if boxes[1].case == "c2":
            assert crop_box(boxes[1], padded.size, torch.device("cpu"))[1] is not None
    if spatial is STILL:
        assert scales == {0.5}
        for box in (CropDataset(index, ["c2"], _large(), 0)[n].boxes[0] for n in range(5)):
            # the axis that has 9 voxels is magnified, and no other
            np.testing.assert_allclose(box.matrix, np.diag([8 / 15, 1.0, 1.0]))
            assert crop_box(box, (16, 16, 16), torch.device("cpu"))[1] is None
        for box in (CropDataset(index, ["c2"], _large(isotropic=True), 0)[n].boxes[0] for n in range(5)):
            np.testing.assert_allclose(box.matrix, np.eye(3) * 8 / 15)


def _large(*, isotropic: bool = False) -> CropRequest:
    return CropRequest((Crop((16, 16, 16), STILL, fit=True, isotropic=isotropic),))


@pytest.mark.parametrize(("looked_at", "least", "most"), [(False, 0.0, 0.7), (True, 0.9, 1.0)])
def test_each_part_that_is_looked_at_is_mostly_body(looked_at: bool, least: float, most: float) -> None:
    """A ball in air: half a window of body is enough for a crop, not for the patches of a puzzle."""
    axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, 16),) * 3, indexing="ij"))
    body, volume, edges = (axes**2).sum(0) < 0.8, np.array([64, 64, 64]), (32, 32, 32)
    parts = [np.array([corner, (0.4,) * 3]) for corner in product((0.0, 0.6), repeat=3)]
    enough = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        low = draw_center(generator, volume, edges, body, parts if looked_at else ()) - 15.5
        shares = []
        for corner, extent in parts:
            first = ((low + corner * 32) / 4).astype(int)
            last = np.ceil((low + (corner + extent) * 32) / 4).astype(int)
            shares.append(body[tuple(slice(a, b) for a, b in zip(first, last, strict=True))].mean())
        enough += min(shares) >= 0.5
    assert least <= enough / 100 <= most


def test_crops_about_the_body() -> None:
    volume, body = np.array([40, 40, 40]), np.zeros((10, 10, 10), bool)
    body[6:8, 2:4, 5] = True  # about voxels 28, 12, 22
    centres = np.stack([body_center(np.random.default_rng(n), volume, (16, 16, 16), body) for n in range(100)])
    assert (abs(centres - np.array([28, 12, 22])) <= 16 / 8 + 1).all()
    assert (centres.std(0) > 0.5).all()
    assert (centres - 7.5 >= 0).all()
    assert (centres + 7.5 <= 39).all()
    whole = body_center(np.random.default_rng(0), volume, (40, 40, 40), np.zeros_like(body))
    assert whole.tolist() == [19.5] * 3
