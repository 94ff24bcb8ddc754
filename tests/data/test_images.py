"""Folders of 2-D images: what is in them, what is read, and what cannot be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nnssl_ext.data.images import ImageDataset, ImageFolder, ImageRequest, eight_bit
from nnssl_ext.errors import UserError
from nnssl_ext.views.random import VALIDATION
from nnssl_ext.views.spatial import crop_box
from tests.images import make_images

REQUEST = ImageRequest((16, 24))
CPU = torch.device("cpu")


def test_classes_and_the_split(tmp_path: Path) -> None:
    images = ImageFolder(make_images(tmp_path / "images", classes=3, each=25))
    assert images.classes.names == ("brick", "coffee", "grass")
    assert len(images) == 75
    assert not set(images.training) & set(images.validation)
    assert len(images.training) + len(images.validation) == 75
    assert {name.split("/", 1)[0] for name in images.validation} == set(images.classes.names)
    assert images.classes.chance == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has 0 subfolders"),
        (["cat/a.png", "cat/b.png"], "has 1 subfolders"),
        (["cat/a.png", "cat/b.png", "dog/c.txt"], "class 'dog' .* has 0 images"),
    ],
)
def test_folders_that_are_none(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="cannot read the folder"):
        ImageFolder(tmp_path / "missing")


def test_a_sample_is_a_function_of_its_number(tmp_path: Path) -> None:
    images = ImageFolder(make_images(tmp_path / "images"))
    first, second = (ImageDataset(images, REQUEST, seed=3) for _ in range(2))
    for number in (7, 0, 100):
        one, other = first[number], second[number]
        assert one.boxes[0].case == other.boxes[0].case
        assert torch.equal(one.boxes[0].data, other.boxes[0].data)
        assert np.array_equal(one.boxes[0].matrix, other.boxes[0].matrix)
    once = [first[number].boxes[0].case for number in range(len(images.training))]
    assert sorted(once) == sorted(images.training)
    validation = ImageDataset(images, REQUEST, seed=3, stream=VALIDATION)
    assert validation[0].boxes[0].case in images.validation


def test_a_region_is_resampled_to_the_crop(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            ramp = np.tile(np.linspace(0, 255, 200, dtype=np.uint8), (120, 1))
            Image.fromarray(ramp).save(tmp_path / name / f"{number}.png")
    whole = ImageRequest((16, 24), area=(1.0, 1.0), aspect=(5 / 3, 5 / 3), flip=0.0)
    sample = ImageDataset(ImageFolder(tmp_path), whole, 0)[0]
    # 120 pixels for 16: seven are averaged while reading
    assert sample.boxes[0].data.shape == (3, 1, 18, 29)
    assert sample.boxes[0].data.dtype == torch.uint8
    crop, inside = crop_box(sample.boxes[0], (1, 16, 24), CPU)
    assert inside is None
    steps = crop[0, 0].diff(dim=1)
    assert (steps > 5).all()
    assert crop[0, 0, 0, 0] < 8
    assert crop[0, 0, 0, -1] > 247
    mirrored = ImageDataset(ImageFolder(tmp_path), ImageRequest((16, 24), (1.0, 1.0), (5 / 3, 5 / 3), 1.0), 0)[0]
    assert torch.allclose(crop_box(mirrored.boxes[0], (1, 16, 24), CPU)[0].flip(-1), crop, atol=1e-3)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16", "F", "CMYK", "LA"])
def test_every_kind_of_image_becomes_three_colours(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    elif mode == "F":
        image = Image.fromarray(np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8))
    else:
        image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).convert(mode)
    found = np.asarray(eight_bit(image))
    assert found.shape == (8, 8, 3)
    if mode in ("I;16", "F"):
        assert (found.min(), found.max()) == (0, 255)


def test_unreadable_images_are_named_and_replaced(tmp_path: Path) -> None:
    images = ImageFolder(make_images(tmp_path / "images", classes=2, each=12))
    bad = images.training[0]
    content = (images.folder / bad).read_bytes()
    (images.folder / bad).write_bytes(content[: len(content) // 3])
    data = ImageDataset(images, REQUEST, seed=0)
    samples = [data[number] for number in range(len(images.training))]
    assert [sample.skipped for sample in samples if sample.skipped] == [(bad,)]
    assert all(sample.boxes and not sample.failure for sample in samples)
    for name in images.training:
        (images.folder / name).write_bytes(b"nothing")
    assert "8 images in a row cannot be read" in data[0].failure


def test_hidden_files_and_those_of_macos_are_no_images(tmp_path: Path) -> None:
    folder = make_images(tmp_path / ".hidden_above" / "images", classes=2, each=3)
    expected = ImageFolder(folder).files
    for name in ("__MACOSX/a.png", ".trash/a.png", "brick/._0.png", "brick/.thumbnails/0.png", "brick/__MACOSX/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert ImageFolder(folder).files == expected
