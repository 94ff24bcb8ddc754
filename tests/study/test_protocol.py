"""Who is seen by which stage, decided before the first run."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnssl_ext.errors import UserError
from nnssl_ext.study.inputs import classes_of, digest_of_cases, held_out_and_pool
from nnssl_ext.study.protocol import Protocol, draw_cases, grouped, keep_protocol, load_protocol
from tests.volumes import write_image

PROTOCOL = Protocol(
    dataset="Dataset900_Phantom",
    configuration="3d_fullres",
    plans="nnUNetPlans",
    overlays=[],
    labels=[1, 2, 8, 20],
    subsets=4,
    steps=600,
    snapshots=[300, 600],
    primary_labels=2,
    primary_step=300,
    rates=[0.01, 0.001],
    development_runs=3,
    total_baseline=0,
    fold=0,
    transductive=False,
    tolerance=2.0,
    seed=0,
)
POOL = [f"case_{n:02d}" for n in range(20)]
HELD_OUT = ["test_1", "test_0"]
ALL = {case: {1, 2} for case in POOL}


def test_subsets_are_nested_and_pairs_differ() -> None:
    cases = draw_cases(PROTOCOL, HELD_OUT, POOL, ALL)
    assert cases.held_out == sorted(HELD_OUT)
    for subset in range(4):
        nested = [set(cases.subsets[labels, subset]) for labels in PROTOCOL.labels]
        assert [len(part) for part in nested] == PROTOCOL.labels
        assert all(small < large for small, large in pairwise(nested))
        assert nested[-1] == set(POOL)
    assert len({tuple(cases.subsets[2, subset]) for subset in range(4)}) > 1
    assert not set(HELD_OUT) & set().union(*map(set, cases.subsets.values()))


def test_rates_are_chosen_on_cases_that_those_runs_do_not_train_on() -> None:
    cases = draw_cases(PROTOCOL, HELD_OUT, POOL, ALL)
    assert len(cases.development_subsets) == 3
    assert len(cases.development) == 4
    for train in cases.development_subsets:
        assert len(train) == PROTOCOL.primary_labels
        assert not set(train) & set(cases.development)
    assert not set(cases.development) & set(HELD_OUT)
    assert draw_cases(replace(PROTOCOL, rates=[0.01]), HELD_OUT, POOL, ALL).development_subsets == []


def test_rates_are_chosen_on_a_case_with_the_class_of_the_endpoint() -> None:
    few = {case: {1, 2} if case == POOL[3] else {1} for case in POOL[:6]}  # so few that one case chooses
    protocol = replace(PROTOCOL, labels=[2, 6])
    cases = [
        draw_cases(replace(protocol, seed=seed), HELD_OUT, POOL[:6], few | {POOL[4]: {1, 2}}, 2) for seed in range(8)
    ]
    assert all(found.development in ([POOL[3]], [POOL[4]]) for found in cases)
    absent = {case: {1} for case in POOL[:6]}
    assert len(draw_cases(protocol, HELD_OUT, POOL[:6], absent, 2).development) == 1


def test_the_same_seed_draws_the_same() -> None:
    assert draw_cases(PROTOCOL, HELD_OUT, POOL, ALL) == draw_cases(PROTOCOL, HELD_OUT, POOL[::-1], ALL)
    assert draw_cases(PROTOCOL, HELD_OUT, POOL, ALL) != draw_cases(replace(PROTOCOL, seed=1), HELD_OUT, POOL, ALL)


def test_every_class_is_in_the_smallest_subset() -> None:
    rare = {case: {1, 2} if case in POOL[:3] else {1} for case in POOL}
    cases = draw_cases(PROTOCOL, HELD_OUT, POOL, rare)
    assert all(cases.subsets[1, subset][0] in POOL[:3] for subset in range(4))
    apart = {case: {1 + n % 2} for n, case in enumerate(POOL)}
    with pytest.raises(UserError, match=r"No 1 of 20 labeled cases .* all of the classes \[1, 2\]"):
        draw_cases(PROTOCOL, HELD_OUT, POOL, apart)
    pairs = draw_cases(replace(PROTOCOL, labels=[2, 20]), HELD_OUT, POOL, apart)
    assert all(len({int(c[-1]) % 2 for c in pairs.subsets[2, s]}) == 2 for s in range(4))


def test_too_many_labels_are_refused() -> None:
    with pytest.raises(UserError, match="20 labeled cases to train on"):
        draw_cases(replace(PROTOCOL, labels=[2, 21]), HELD_OUT, POOL, ALL)


def test_without_a_rate_to_choose_all_labels_may_be_asked_for() -> None:
    everything = replace(PROTOCOL, labels=[20], primary_labels=20)
    with pytest.raises(UserError, match="the endpoint.s 20 do not fit"):
        draw_cases(everything, HELD_OUT, POOL, ALL)
    assert draw_cases(replace(everything, rates=[0.01]), HELD_OUT, POOL, ALL).subsets[20, 0] == POOL


def test_cases_without_labels_are_seen_by_pretraining_and_are_no_labels() -> None:
    labelled = {case: {1, (1, 2)} for case in POOL[::2]}
    protocol = replace(PROTOCOL, labels=[1, 2, 10], subsets=8)
    cases = draw_cases(protocol, HELD_OUT, POOL, labelled)
    assert (cases.pool, cases.labeled) == (POOL, POOL[::2])
    for part in (cases.development, *cases.subsets.values(), *cases.development_subsets):
        assert set(part) <= set(POOL[::2])
    with pytest.raises(UserError, match="10 labeled cases to train on"):
        draw_cases(replace(protocol, labels=[2, 11]), HELD_OUT, POOL, labelled)
    # nnU-Net's names of regions are no numbers
    apart = {case: {1} if n else {(1, 2), "x"} for n, case in enumerate(POOL)}
    with pytest.raises(UserError, match=r"show all of the classes \[\(1, 2\), 1, 'x'\]"):
        draw_cases(protocol, HELD_OUT, POOL, apart)


def test_rates_are_chosen_on_cases_that_show_every_class() -> None:
    rare = {case: {1, 2} if case in POOL[:2] else {1} for case in POOL}
    for seed in range(10):
        cases = draw_cases(replace(PROTOCOL, seed=seed, labels=[2, 20]), HELD_OUT, POOL, rare)
        assert set(cases.development) & set(POOL[:2])


def test_a_protocol_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    keep_protocol(PROTOCOL, path)
    keep_protocol(PROTOCOL, path)
    assert load_protocol(path) == PROTOCOL
    with pytest.raises(UserError, match="holds a study with primary_step 300, got 600"):
        keep_protocol(replace(PROTOCOL, primary_step=600), path)
    assert load_protocol(path) == PROTOCOL
    path.write_text("{}")
    with pytest.raises(UserError, match="is no protocol of this version"):
        load_protocol(path)


def test_a_group_is_never_divided() -> None:
    pool = [f"patient{n:03d}_frame{frame:02d}" for n in range(20) for frame in (1, 12)]
    protocol = replace(PROTOCOL, group_by=r"patient(\d+)")
    cases = draw_cases(protocol, ["patient100_frame01"], pool, {case: {1} for case in pool})
    assert cases.groups == 20
    for (labels, _), train in cases.subsets.items():
        assert len(train) == 2 * labels
        assert len({case[:10] for case in train}) == labels
    for train in cases.development_subsets:
        assert not {case[:10] for case in train} & {case[:10] for case in cases.development}


def test_groups_come_from_names() -> None:
    assert grouped(["b_2", "a_1", "b_1"], r"^([a-z])_") == {"a": ["a_1"], "b": ["b_1", "b_2"]}
    assert grouped(["b", "a"], "") == {"a": ["a"], "b": ["b"]}
    with pytest.raises(UserError, match=r"got none of .* in x$"):
        grouped(["a_1", "x"], r"^([a-z])_")
    with pytest.raises(UserError, match="expected a regular expression"):
        grouped(["a"], "(")


def test_too_few_cases_for_the_folds_are_one_line(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("p1_a", "p1_b", "p2_a", "p2_b", "p3_a", "p3_b"):
        data.mkdir(exist_ok=True)
        (data / f"{name}.b2nd").touch()
    with pytest.raises(UserError, match="expected at least 5 groups for 5 folds, got 3. Write a splits_final.json"):
        held_out_and_pool(tmp_path, data, 0, r"(p\d)_")
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["p1_a", "p2_a"], "val": ["p1_b"]}]))
    with pytest.raises(UserError, match="got one fold that divides one. Correct it, or write two folds or more"):
        held_out_and_pool(tmp_path, data, 0, r"(p\d)_")
    # what a split leaves out stays out
    folds = [{"train": ["p1_a", "p2_a"], "val": ["p1_b"]}, {"train": ["p1_a", "p1_b"], "val": ["p2_a"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    held_out, pool = held_out_and_pool(tmp_path, data, 0, r"(p\d)_")
    assert sorted([*held_out, *pool]) == ["p1_a", "p1_b", "p2_a"]
    (tmp_path / "splits_final.json").unlink()
    (data / "p1_a.b2nd").unlink()
    (data / "p1_b.b2nd").unlink()
    with pytest.raises(UserError, match="expected at least 5 cases for 5 folds, got 4"):
        held_out_and_pool(tmp_path, data, 0)


def test_unpacked_cases_are_the_same_inputs(tmp_path: Path) -> None:
    """nnU-Net unpacks .npz into the same folder when a training starts."""
    (tmp_path / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    truth = write_image(tmp_path / "gt_segmentations" / "a.nii.gz", np.random.default_rng(0).random((4, 8, 8)))
    (tmp_path / "data").mkdir()
    for name in ("a.npz", "a.pkl"):
        (tmp_path / "data" / name).write_bytes(b"1")
    before = digest_of_cases(tmp_path, tmp_path / "data", ["a"])
    for name in ("a.npy", "a_seg.npy"):
        (tmp_path / "data" / name).write_bytes(b"12")
    assert digest_of_cases(tmp_path, tmp_path / "data", ["a"]) == before
    (tmp_path / "data" / "a.npz").write_bytes(b"12")
    assert digest_of_cases(tmp_path, tmp_path / "data", ["a"]) != before
    truth.write_bytes(truth.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"a.nii.gz cannot be read .*. Copy the label map again"):
        digest_of_cases(tmp_path, tmp_path / "data", ["a"])


def test_cases_of_the_ignore_label_alone_are_unlabeled(tmp_path: Path) -> None:
    some, none = np.zeros((3, 4), dtype=int), np.zeros((0, 4), dtype=int)
    image, labels = np.random.default_rng(0).random((1, 8, 8, 8), dtype=np.float32), np.zeros((1, 8, 8, 8), np.int8)
    for case, place in (("a", some), ("b", none)):
        properties = {"class_locations": {1: place, 2: none, (-1, 1, 2): place}}
        nnUNetDatasetBlosc2.save_case(image, labels, properties, str(tmp_path / case))
    assert classes_of(tmp_path, ["a", "b"]) == {"a": {1}}
