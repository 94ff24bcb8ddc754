"""Run a chain of commands that can be continued."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nnssl_ext.environment import commands_path, program
from nnssl_ext.errors import UserError
from nnssl_ext.recipe import read_json, write_json

#: Lines of a failed command's log to show.
TAIL = 15


@dataclass
class Step:
    """One command, or a piece of Python.

    Attributes:
        title: Title for people.
        done: Returns whether its result exists.
        command: Returns the words of the command when the step starts.
        variables: Environment variables beside those of the chain.
        epochs: Returns how many "Epoch N" lines its log will show.
        action: Runs in this process, instead of a command.
    """

    title: str
    done: Callable[[], bool]
    command: Callable[[], Sequence[str]] | None = None
    variables: dict[str, str] = field(default_factory=dict)
    epochs: Callable[[], int] = lambda: 0
    action: Callable[[], None] | None = None


@dataclass
class Chain:
    """Run steps in order, with logs and durations."""

    folder: Path
    variables: dict[str, str]
    steps: list[Step]

    def run(self) -> None:
        """Do the steps that are not done.

        Raises:
            UserError: If a command fails. The message names its log.
        """
        for number, step in enumerate(self.steps, 1):
            head = f"[{number}/{len(self.steps)}] {step.title}"
            if step.done():
                print(f"{head}: done before", flush=True)
                continue
            begin = time.monotonic()
            if step.action:
                step.action()
            # asked once: a command may depend on files that running it changes
            words = list(step.command()) if step.command else []
            if words:
                self._command(number, step, words, head)
            seconds = time.monotonic() - begin
            self._note(step, words, seconds)
            print(f"{head}: {seconds:.0f} s", flush=True)

    def records(self) -> list[dict]:
        """Return title, command and seconds of each finished step."""
        known = self._known()
        return [known[step.title] for step in self.steps if step.title in known]

    def _note(self, step: Step, words: list[str], seconds: float) -> None:
        record = {"title": step.title, "command": shlex.join(words), "seconds": seconds}
        write_json({**self._known(), step.title: record}, self._notes)

    @property
    def _notes(self) -> Path:
        return self.folder / "steps.json"

    def _known(self) -> dict[str, dict]:
        return read_json(self._notes) if self._notes.is_file() else {}

    def _command(self, number: int, step: Step, words: list[str], head: str) -> None:
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{number:02d}_{re.sub(r'[^a-z0-9]+', '_', step.title.lower()).strip('_')}.txt"
        process = subprocess.Popen(
            [program(words[0]), *words[1:]],
            env={**os.environ, **self.variables, **step.variables, "PATH": commands_path(), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        bar = tqdm(total=step.epochs() or None, desc=head, unit="epoch", leave=False, disable=not sys.stderr.isatty())
        try:
            with log.open("w", buffering=1, encoding="utf-8") as file, bar:
                for line in process.stdout:
                    file.write(line)
                    found = re.search(r"\bEpoch (\d+)\s*$", line)
                    if found:
                        bar.update(int(found[1]) - bar.n)
                    bar.refresh()
            status = process.wait()
        except BaseException as error:
            if os.name != "nt" or not isinstance(error, KeyboardInterrupt):  # there, Ctrl-C reached it, too
                process.terminate()
            process.wait()
            raise
        if status:
            tail = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-TAIL:])
            print(f"{tail}\n", file=sys.stderr)
            raise UserError(f"Step '{step.title}' failed with status {status}. Its log: {log}.")
