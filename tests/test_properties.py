"""Properties of what is drawn, merged and transferred, on whatever hypothesis thinks of."""

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnssl_ext.data.crops import body_center, draw_center
from nnssl_ext.data.images import ImageRequest, draw_region
from nnssl_ext.data.loader import Shard
from nnssl_ext.recipe import check_json, merged
from nnssl_ext.training.distributed.ranks import mean_over_samples
from nnssl_ext.views.spatial import SourceBox, SpatialRange, crop_box, half_extent

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
edges = st.tuples(*[st.integers(1, 40)] * 3)
seeds = st.integers(0, 2**32)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(st.text("abc", max_size=2), json_values, max_size=4)


@quick
@given(volume=edges, size=edges, seed=seeds)
def test_a_crop_lies_in_its_volume_or_about_it(volume: tuple, size: tuple, seed: int) -> None:
    body = np.random.default_rng(seed).random(tuple(min(16, n) for n in volume)) > 0.5
    for draw in (draw_center, body_center):
        centre = draw(np.random.default_rng(seed), np.asarray(volume), size, body)
        low = centre - (np.asarray(size) - 1) / 2
        high = low + np.asarray(size)
        for axis in range(3):
            if size[axis] <= volume[axis]:
                assert low[axis] >= 0
                assert high[axis] <= volume[axis]
            elif draw is draw_center:  # padded by the same on both sides, up to a voxel
                assert abs(-low[axis] - (high[axis] - volume[axis])) <= 1


@quick
@given(size=st.tuples(*[st.integers(2, 7)] * 3), seed=seeds)
def test_flips_and_quarter_turns_only_move_voxels(size: tuple, seed: int) -> None:
    generator = np.random.default_rng(seed)
    spatial = SpatialRange((1.0, 1.0, 1.0), flip=0.5, rot90=0.5)
    matrix = spatial.draw(generator, size)
    assert np.allclose(matrix @ matrix.T, np.eye(3))
    half = half_extent(matrix, size)
    edge = np.ceil(2 * half - 1e-6).astype(int) + 1
    data = torch.from_numpy(generator.standard_normal((1, *edge)).astype(np.float32))
    crop, inside = crop_box(SourceBox(data, matrix, (edge - 1) / 2, "c"), size, torch.device("cpu"))
    assert sorted(edge) == sorted(size)
    assert inside is None
    assert torch.equal(crop.flatten().sort()[0], data.flatten().sort()[0])
    # turned back, it is what it was
    back, _ = crop_box(SourceBox(crop, matrix.T, (np.asarray(size) - 1) / 2, "c"), edge.tolist(), torch.device("cpu"))
    assert torch.equal(back, data)


@quick
@given(below=objects, above=objects)
def test_merging_keeps_what_is_above_and_changes_neither(below: dict, above: dict) -> None:
    copies = repr(below), repr(above)
    result = merged(below, above)
    assert (repr(below), repr(above)) == copies
    assert set(result) == set(below) | set(above)
    for key, value in above.items():
        if not isinstance(value, dict) or not isinstance(below.get(key), dict):
            assert result[key] == value
        else:
            assert result[key] == merged(below[key], value)
    assert merged(result, above) == result
    assert merged(below, {}) == below
    check_json(result)


@quick
@given(batch=st.integers(1, 9), world=st.integers(1, 5), first=st.integers(0, 5), length=st.integers(0, 5))
def test_shards_are_a_partition_of_the_samples(batch: int, world: int, first: int, length: int) -> None:
    shards = [list(Shard(first, first + length, batch, rank, world)) for rank in range(world)]
    together = sorted(sample for shard in shards for row in shard for sample in row)
    assert together == list(range(first * batch, (first + length) * batch))
    # begun anew at any batch, the rest is the same
    for at in range(length + 1):
        assert list(Shard(first + at, first + length, batch, 0, world)) == shards[0][at:]


@quick
@given(height=st.integers(1, 500), width=st.integers(1, 500), seed=seeds)
def test_a_region_lies_in_its_image(height: int, width: int, seed: int) -> None:
    low, high = draw_region(np.random.default_rng(seed), height, width, ImageRequest((4, 4)))
    assert (low >= 0).all()
    assert (high > low).all()
    assert (high <= [height, width]).all()


@quick
@given(values=st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=4), min_size=1, max_size=5))
def test_means_do_not_count_what_is_not_finite(values: list) -> None:
    outputs = [{"loss": torch.tensor(row)} for row in values]
    bad = [{"loss": torch.tensor([float("nan"), float("inf")])}]
    assert mean_over_samples(outputs + bad) == mean_over_samples(outputs)
