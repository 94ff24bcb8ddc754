"""Fork commands from a process that has imported nnU-Net's dependencies: ``python server.py SOCKET``.

It ends when its standard input is closed.
"""

import atexit
import contextlib
import fcntl
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

#: Variables that are read when Python or a dependency starts. A command with others is not forked.
READ_AT_START = ("PYTHON", "OMP_", "MKL_", "TORCH", "CUDA", "NVIDIA", "MPL", "LD_", "LC_", "LANG")
#: The first two change nothing that a test looks at. The third is set in the fork. The last is read at the first use.
EXCEPT = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def import_dependencies() -> None:
    """Import all that nnU-Net imports, and forget nnU-Net itself: it reads its folders at its import."""
    with contextlib.redirect_stdout(None):
        import torch._dynamo
        from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints
        from nnunetv2.inference import predict_from_raw_data
        from nnunetv2.run import run_training
    del torch, plan_and_preprocess_entrypoints, predict_from_raw_data, run_training
    for name in [name for name in sys.modules if name.partition(".")[0] == "nnunetv2"]:
        del sys.modules[name]


def at_start(variables: dict[str, str]) -> dict[str, str]:
    """Return the variables that a fork cannot change any more."""
    names = [name for name in variables if name.startswith(READ_AT_START) and name not in EXCEPT]
    return {name: variables[name] for name in names}


OWN = at_start(dict(os.environ))


def like_own(variables: dict[str, str]) -> bool:
    """Return whether a fork has these variables, from its start or from what torch set at its import."""
    theirs = at_start(variables)
    return OWN.keys() <= theirs.keys() and all(
        value in (OWN.get(name), os.environ.get(name)) for name, value in theirs.items()
    )


def run(words: dict, streams: list[int]) -> None:
    """Become the command, in a fork."""
    # first out of the way of the numbers that they must have
    moved = [fcntl.fcntl(stream, fcntl.F_DUPFD, 300) for stream in streams]
    for stream in streams:
        os.close(stream)
    for stream, number in zip(moved, words["files"], strict=True):
        os.dup2(stream, number)
        os.close(stream)
    with contextlib.suppress(OSError):
        os.setpgid(0, words["group"])
    os.environ.clear()
    os.environ.update(words["variables"])
    os.chdir(words["folder"])
    import numpy as np
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    np.random.seed()
    random.seed()
    argv = words["argv"]
    sys.orig_argv = [sys.executable, *argv]
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(argv[1], vars(sys.modules["__main__"]))
    elif argv[0] == "-m":
        sys.argv = ["", *argv[2:]]
        sys.path[0] = words["folder"]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path[0] = os.path.dirname(argv[0])
        runpy.run_path(argv[0], run_name="__main__")


def end(function: Callable[..., None], *words: Any) -> NoReturn:
    """Call a function and end as Python does, without the second that it takes to free all modules."""
    status = 0
    try:
        function(*words)
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """Read what a command must know, and its open files."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 200)
    try:
        with connection.makefile("rb") as received:
            return json.loads(received.read(int.from_bytes(head, "big"))), streams
    except (OSError, ValueError):
        for stream in streams:
            os.close(stream)
        raise


def serve(listening: socket.socket) -> tuple[dict, list[int]] | None:
    """Fork until the standard input is closed. Return in each fork, with what it must run."""
    running: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([listening, sys.stdin, *running.values()], [], [], 0.02 if running else None)
        if sys.stdin in readable:
            return None
        for process, connection in list(running.items()):
            if connection in readable:  # whoever asked is gone, as after SIGKILL
                os.kill(process, signal.SIGKILL)
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                running.pop(process).close()
        if listening not in readable:
            continue
        connection, _ = listening.accept()
        try:
            words, streams = receive(connection)
        except (OSError, ValueError):  # it was killed before it had said all
            connection.close()
            continue
        same = like_own(words["variables"]) and words["executable"] == sys.executable
        process = os.fork() if same else 0
        if same and not process:
            for other in (listening, connection, *running.values()):
                other.close()
            return words, streams
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(OSError):
            connection.sendall(f"{process}\n".encode())
        if process:
            running[process] = connection
        else:
            connection.close()


if __name__ == "__main__":
    import_dependencies()
    gc.freeze()  # what is never collected stays shared between forks
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(sys.argv[1])
        door.listen()
        print("ready", flush=True)
        command = serve(door)
    end(run, *command) if command else end(lambda: None)
