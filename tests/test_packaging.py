"""A wheel, an installed package and a checkout behave the same."""

import ast
import graphlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnssl_ext import __version__
from nnssl_ext.recipe import available_recipes
from tests.conftest import REPOSITORY, Environment

FIND = (
    "import pickle; from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find;"
    "a = find('nnsslTrainer_VolumeFusion'); b = find('nnsslTrainer_VolumeFusion');"
    "import nnssl_ext; assert a is b and pickle.loads(pickle.dumps(a)) is a; print(nnssl_ext.__file__)"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(REPOSITORY),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_has_everything(wheel: Path) -> None:
    assert wheel.name == f"nnssl_ext-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("trainers", "plans"):
        packed = {Path(n).name for n in names if n.startswith(f"nnssl_ext/{folder}/")}
        assert packed == {p.name for p in (REPOSITORY / folder).iterdir() if p.suffix in (".py", ".json")}
    modules = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "nnssl_ext").rglob("*.py")}
    assert modules <= set(names)
    assert not [n for n in names if n.startswith("tests/")]


def test_installed_wheel_behaves_as_the_checkout(wheel: Path, environment: Environment, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    answers = {}
    for name, path in (("wheel", target), ("checkout", REPOSITORY)):
        variables = {"PYTHONPATH": str(path)}
        folder = environment.run(sys.executable, "-m", "nnssl_ext", "trainers", variables=variables).stdout.strip()
        assert Path(folder).is_relative_to(path)
        found = environment.run(sys.executable, "-c", FIND, variables={**variables, "nnUNet_extTrainer": folder}).stdout
        assert Path(found.splitlines()[-1]).is_relative_to(path)
        answers[name] = environment.run(sys.executable, "-m", "nnssl_ext", "methods", variables=variables).stdout
    assert answers["wheel"] == answers["checkout"]
    assert all(recipe in answers["wheel"] for recipe in available_recipes())


def test_trainers_folder_holds_thin_modules_with_absolute_imports() -> None:
    for path in (REPOSITORY / "trainers").glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 10
        assert "from ." not in text
    assert not (REPOSITORY / "trainers" / "__init__.py").exists()


def test_no_file_is_over_400_lines() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): count
        for folder in ("nnssl_ext", "trainers", "tests")
        for path in (REPOSITORY / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


#: The floors of the package, lowest first. Modules directly in ``nnssl_ext`` belong to no floor.
FLOORS = (
    ("losses", "views", "networks"),
    ("data",),
    ("methods", "transfer"),
    ("features",),
    ("training", "study"),
    ("cli",),
)


def imported(path: Path) -> Iterator[str]:
    """All modules of ours and nnU-Net's that a file imports, within functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_only_go_down() -> None:
    """Losses, views, networks, data and methods never know nnU-Net's trainer or anything above them."""
    height = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    for path in (REPOSITORY / "nnssl_ext").rglob("*.py"):
        own = height.get(path.relative_to(REPOSITORY / "nnssl_ext").parts[0], -1)
        for module in imported(path):
            if module.startswith("nnssl_ext.") and own >= 0:
                assert height.get(module.split(".")[1], -1) <= own, f"{path}: {module}"
            if 0 <= own < height["training"]:
                assert not module.startswith("nnunetv2.training.nnUNetTrainer"), f"{path}: {module}"


def test_modules_import_each_other_in_no_cycle() -> None:
    """Imports for type checkers count, imports within functions do not."""
    folder = REPOSITORY / "nnssl_ext"
    names = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in folder.rglob("*.py")}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        blocks = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.If))]
        graph[name] = set()
        for node in (node for block in blocks for node in block if isinstance(node, ast.ImportFrom) and node.module):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                graph[name] |= {whole if whole in names else str(node.module)} & set(names)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_no_function_outside_trainers_takes_a_trainer() -> None:
    for path in (REPOSITORY / "nnssl_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                taken = [g for g in given if g.arg == "trainer" and "str" not in ast.unparse(g.annotation or g)]
                assert not taken, f"{path}:{node.lineno}"


def test_nothing_is_written_into_nnunet() -> None:
    import nnunetv2

    folder = Path(nnunetv2.__path__[0])
    assert not [p for p in folder.rglob("*") if "nnssl" in p.name.lower()]


def test_text_is_utf8_whatever_the_locale() -> None:
    """Every text file of ours is opened in an encoding of its own; the locale's is read only as nnU-Net reads it."""
    silent = []
    for path in (REPOSITORY / "nnssl_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, (ast.Attribute, ast.Name)):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            text = name in ("read_text", "write_text") or (name == "open" and _text_mode(node))
            named = any(keyword.arg == "encoding" for keyword in node.keywords) or (name == "read_text" and node.args)
            if text and not named:
                silent.append(f"{path.relative_to(REPOSITORY)}: {ast.unparse(node)}")
    assert silent == ["nnssl_ext/train.py: file.read_text()"]


def _text_mode(call: ast.Call) -> bool:
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return any(set(mode) <= set("rwaxt+") and "b" not in mode for mode in modes)
