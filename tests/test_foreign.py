"""Files from elsewhere: nothing of them is executed, in any entry point, and none makes us read without end."""

import gzip
import io
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK
import torch

from nnssl_ext import checkpoint
from nnssl_ext.cli import main
from nnssl_ext.data.cases import open_case
from nnssl_ext.data.index import CaseIndex, examine
from nnssl_ext.errors import RefusedError, UserError
from nnssl_ext.foreign import check_tensors, load_npz, load_tensors, nifti_problem, unpack_tar
from nnssl_ext.recipe import MAX_JSON_BYTES, load_recipe, read_json
from nnssl_ext.study.page import Page, Section, Table, render
from nnssl_ext.study.results import training_log
from nnssl_ext.transfer.read import read_source
from tests.conftest import Environment
from tests.support.runs import TRAINER, pretrain
from tests.volumes import write_image

Data = Callable[[str], Environment]


class Malicious:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def malicious_files() -> list[Path]:
    """A checkpoint with a pickle in it, a bare pickle, and one in the legacy format."""
    torch.save({"network_weights": {"a": torch.zeros(1)}, "nnssl_ext": {"format": 2}, "x": Malicious()}, "zip.pth")
    Path("bare.pth").write_bytes(pickle.dumps(Malicious()))
    torch.save(Malicious(), "legacy.pth", _use_new_zipfile_serialization=False)
    return [Path(name) for name in ("zip.pth", "bare.pth", "legacy.pth")]


def test_a_malicious_checkpoint_is_not_executed_by_any_command(with_data: Data, here: Path) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 1})
    fold = environment.fold("plain", "run", TRAINER)
    fold.mkdir(parents=True)
    for file in malicious_files():
        for read in (checkpoint.load, training_log, lambda path: read_source(str(path))):
            with pytest.raises(UserError) as error:
                read(file)
            assert "\n" not in str(error.value)
        commands = [
            ["transfer", str(file), "-d", "811", "-c", "3d_fullres", "-p", "run", "-o", "out.pth"],
            ["export", str(file), "-o", "out"],
        ]
        for command in commands:
            with pytest.raises(SystemExit) as ended:
                main(command)
            assert ended.value.code not in (0, None)
        for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_previous.pth"):
            (fold / name).write_bytes(file.read_bytes())
            with pytest.raises(UserError, match="None can be read"):
                pretrain(environment, "plain", "run", c=True)
            (fold / name).unlink()
    assert not Path("executed").exists()


def test_arrays_with_objects_or_code_are_refused(here: Path) -> None:
    np.save("object.npy", np.array([Malicious()], dtype=object), allow_pickle=True)
    np.savez("object_in.npz", data=np.array([Malicious()], dtype=object))
    base = blosc2.asarray(np.zeros((1, 4, 4, 4), np.float32), urlpath="base.b2nd", mode="w")
    (base + 1).save(urlpath="lazy.b2nd", mode="w")
    for case in ("object", "object_in", "lazy"):
        record = examine(here, case)
        assert record.problem.startswith("cannot be read (")
    with pytest.raises(RefusedError, match="can run code; an array was expected"):
        open_case(here, "lazy")
    assert np.asarray(open_case(here, "base")[:]).shape == (1, 4, 4, 4)
    assert not Path("executed").exists()


def test_an_index_with_objects_is_made_anew(with_data: Data, here: Path) -> None:
    folder = with_data("plain").dataset("plain") / "nnUNetPlans_3d_fullres"
    index = folder.parent / f"nnssl_ext_index_{folder.name}.npz"
    np.savez(index, version=1, cases=np.array([Malicious()], dtype=object), keys=0, shape=0, body=0, problem=0)
    assert len(CaseIndex.build(folder).cases) == 6
    assert not Path("executed").exists()


def test_bombs_stop_at_a_limit(here: Path) -> None:
    torch.save({"a": torch.zeros(10**6)}, "c.pth")
    with zipfile.ZipFile("c.pth") as plain, zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in plain.namelist():
            bomb.writestr(member, plain.read(member))
    load_tensors(Path("c.pth"))
    with pytest.raises(RefusedError, match="its parts are larger than the file"):
        load_tensors(Path("bomb.pth"))
    torch.save({"network_weights": {"a": torch.zeros(1).expand(10**12)}}, "expanded.pth")
    with pytest.raises(UserError, match="shows more than it stores"):
        read_source("expanded.pth")
    with zipfile.ZipFile("more.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as bomb:
        bomb.writestr("data.npy", bytes(3 * 10**7))
    with pytest.raises(RefusedError, match="would unpack to"):
        load_npz(Path("more.npz"), "data")
    with tarfile.open("bomb.tar", "w:gz") as archive:
        info = tarfile.TarInfo("zeros")
        info.size = 3 * 10**7
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(RefusedError, match="would unpack to more than"):
        unpack_tar(Path("bomb.tar"), here / "out")
    assert not (here / "out").exists()
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RefusedError, match="nested too deeply"):
        check_tensors(deep)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "device"])
def test_members_of_an_archive_stay_in_its_folder(here: Path, kind: str) -> None:
    with tarfile.open("a.tar", "w") as archive:
        info = tarfile.TarInfo({"parent": "../outside", "absolute": str(here / "outside")}.get(kind, "inside"))
        if kind == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "../../outside"
        if kind == "device":
            info.type = tarfile.CHRTYPE
        archive.addfile(info)
    if kind == "absolute":  # made relative, or refused
        with suppress(tarfile.TarError):
            unpack_tar(Path("a.tar"), here / "out")
    else:
        with pytest.raises(tarfile.TarError):
            unpack_tar(Path("a.tar"), here / "out")
    assert not (here / "outside").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is refused: it is nested"),
        ('{"a":' * 100 + "1" + "}" * 100, "is refused: it is nested more than 64 levels deep"),
        ('{"epochs": ' + "9" * 10_000 + "}", "is not valid JSON"),
        ("\x00\xff", "is not valid JSON"),
        ("null", "must hold a JSON dict, got NoneType"),
    ],
)
def test_json_is_limited_in_depth(here: Path, text: str, message: str) -> None:
    Path("r.json").write_bytes(text.encode("latin-1"))
    for read in (read_json, lambda path: load_recipe(str(path))):
        with pytest.raises(UserError, match=message):
            read(Path("r.json"))


def test_json_is_limited_in_size(here: Path) -> None:
    with Path("r.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(UserError, match="more than any settings: refused"):
        read_json(Path("r.json"))


def test_reports_escape_names_from_files(here: Path) -> None:
    evil = "<script>alert(1)</script>"
    table = Table([evil], [[evil]])
    text = render(
        Path("page.html"), Page(evil, evil, table, [Section(evil, [evil], table, code=evil)], [evil])
    ).read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_names_from_files_reach_no_shell() -> None:
    from tests.conftest import REPOSITORY

    for path in (REPOSITORY / "nnssl_ext").rglob("*.py"):
        text = path.read_text()
        assert "shell=True" not in text, path
        assert "os.system(" not in text, path
        assert "allow_pickle=True" not in text, path
        assert "weights_only=False" not in text, path
        if path.name != "foreign.py":
            assert "= torch.load(" not in text, path
            assert "extractall(" not in text, path


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_files_that_are_cut_short(tmp_path: Path, ending: str) -> None:
    """ITK reads what is missing as zeros."""
    image = np.random.default_rng(0).integers(1, 2000, (8, 16, 16)).astype(np.int16)
    path = write_image(tmp_path / f"a{ending}", image)
    assert nifti_problem(path) == ""
    content = path.read_bytes()
    for missing in (100, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:-missing])
        if missing < len(content) - 10:
            assert (SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))) == 0).any()
        assert re.match("is cut short: it holds [0-9,]+ of 4,448 bytes|cannot be read", nifti_problem(path))
    if ending == ".nii.gz":
        middle = len(content) // 2  # damaged in the middle, with an intact end
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
        assert nifti_problem(path).startswith("cannot be read")
        assert nifti_problem(path, quick=True) == ""
        # several members, as other programs write them
        plain = gzip.decompress(content)
        path.write_bytes(gzip.compress(plain[:1000]) + gzip.compress(plain[1000:]))
        assert nifti_problem(path) == ""
