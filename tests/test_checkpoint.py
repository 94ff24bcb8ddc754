from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError


def content() -> dict:
    weights = torch.randn(64, 64)
    return {
        "network_weights": {"a": weights, "alias": weights, "b": torch.zeros(3, dtype=torch.int64)},
        "logging": {"loss": [np.float32(0.5), np.int64(3)], "array": np.arange(3)},
        "nnssl_ext": {"format": checkpoint.FORMAT},
    }


def test_round_trip_is_plain_and_keeps_aliases(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    original = content()
    checkpoint.save(original, path)
    back = checkpoint.load(path)
    assert torch.equal(back["network_weights"]["a"], original["network_weights"]["a"])
    assert back["network_weights"]["a"].data_ptr() == back["network_weights"]["alias"].data_ptr()
    assert back["logging"] == {"loss": [0.5, 3], "array": [0, 1, 2]}
    assert path.stat().st_size < 1.5 * 64 * 64 * 4
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    checkpoint.save(content(), path)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=r"c\.pth is damaged or no pretraining checkpoint"):
        checkpoint.load(path)
    place = len(good) // 3  # amid the weights
    path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="cannot read checkpoint .*: No such file"):
        checkpoint.load(tmp_path / "absent.pth")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"network_weights": {}}, path)
    with pytest.raises(UserError, match="no pretraining checkpoint"):
        checkpoint.load(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="no pretraining checkpoint"):
        checkpoint.load(path)
    checkpoint.save({**content(), "nnssl_ext": {"format": checkpoint.FORMAT}}, path)
    later = torch.load(path)
    later["nnssl_ext"]["format"] = 99
    torch.save(later, path)
    with pytest.raises(UserError, match="has format 99"):
        checkpoint.load(path)


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pth"
    checkpoint.save(content(), path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="could not be written .*No space left.*untouched"):
        checkpoint.save(content(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_digest_sees_names_shapes_and_values() -> None:
    tensor = torch.arange(6.0)
    digests = {
        checkpoint.digest(weights)
        for weights in ({"a": tensor}, {"b": tensor}, {"a": tensor.reshape(2, 3)}, {"a": tensor + 1}, {})
    }
    assert len(digests) == 5
    transposed = tensor.reshape(2, 3).T
    assert checkpoint.digest({"a": transposed}) == checkpoint.digest({"a": transposed.contiguous()})


def test_a_run_of_an_earlier_version_is_not_continued_but_its_weights_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    checkpoint.save(content() | {"nnssl_ext": {"format": 2, "versions": {"nnssl_ext": "0.1.0"}}}, path)
    read = checkpoint.load(path)
    with pytest.raises(UserError, match=r"begun with nnssl_ext 0.1.0, this is .* Continue it with nnssl_ext 0.1.0"):
        checkpoint.refuse_older(read, str(path))
    read["nnssl_ext"]["format"] = checkpoint.FORMAT
    checkpoint.refuse_older(read, str(path))


def test_every_value_counts_in_the_digest() -> None:
    own = {"format": checkpoint.FORMAT, "counters": {"step": 3}, "state": {"center": torch.zeros(3)}}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3), "step": 3.0}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    whole = {"nnssl_ext": own, "optimizer_state": optimizer, "logging": {"loss": [0.5, 0.25]}}

    def changed(value: Any) -> Iterator[Any]:
        """Yield copies that differ in one value."""
        if isinstance(value, torch.Tensor):
            yield value + 1
        elif isinstance(value, (dict, list)):
            for key in value if isinstance(value, dict) else range(len(value)):
                for other in changed(value[key]):
                    copy = value.copy()
                    copy[key] = other
                    yield copy
        else:
            yield value + 1

    digests = [checkpoint.content_digest(content) for content in (whole, *changed(whole))]
    assert len(set(digests)) == len(digests) == 10
