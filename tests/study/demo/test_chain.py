import json
import sys
from pathlib import Path

import pytest

from nnssl_ext.errors import UserError
from nnssl_ext.study.demo.chain import Chain, Step


def chain(folder: Path, code: str) -> Chain:
    made = folder / "made"
    return Chain(
        folder,
        {"GREETING": "hello"},
        [
            Step("First", (folder / "first").exists, action=(folder / "first").touch),
            Step(
                "Second, by a command",
                made.exists,
                lambda: [sys.executable, "-c", code],
                {"PLACE": str(made)},
                lambda: 2,
            ),
        ],
    )


GOOD = "import os; print('Epoch 0'); print('Epoch 1'); open(os.environ['PLACE'], 'w').write(os.environ['GREETING'])"


def test_does_what_is_not_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain(tmp_path, GOOD).run()
    assert (tmp_path / "made").read_text() == "hello"
    assert [record["title"] for record in chain(tmp_path, GOOD).records()] == ["First", "Second, by a command"]
    assert "Epoch 1" in (tmp_path / "logs" / "02_second_by_a_command.txt").read_text()
    before = json.loads((tmp_path / "steps.json").read_text())
    capsys.readouterr()
    chain(tmp_path, "raise SystemExit(3)").run()
    assert capsys.readouterr().out.count("done before") == 2
    assert json.loads((tmp_path / "steps.json").read_text()) == before


def test_a_command_that_depends_on_its_result_is_noted_as_it_ran(tmp_path: Path) -> None:
    steps = chain(tmp_path, GOOD)
    made = tmp_path / "made"
    steps.steps[1].command = lambda: [sys.executable, "-c", GOOD, *(["--c"] if made.exists() else [])]
    steps.run()
    assert made.exists()
    assert not steps.records()[1]["command"].endswith("--c")


def test_a_failed_command_names_its_log_and_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"Step 'Second, by a command' failed with status 3. Its log: .*02_second"):
        chain(tmp_path, "print('what went wrong'); raise SystemExit(3)").run()
    assert "what went wrong" in capsys.readouterr().err
    chain(tmp_path, GOOD).run()
    assert (tmp_path / "made").exists()
