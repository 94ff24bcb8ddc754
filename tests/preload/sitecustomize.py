"""Let a command run in a fork of ``server.py``. Python imports this file at its start, from PYTHONPATH.

Two thirds of a short command are imports of torch and of nnU-Net's other dependencies. The server has imported them.
nnU-Net and this package are imported anew in every command. Where a fork would differ from the command, the command
runs as always.
"""

import os
import sys

#: Options of Python without an effect on tests. PYTHONWARNINGS of the server says the last one too.
WITHOUT_EFFECT = ("-u", "-B", "-s", "-Wignore")
MODULES = ("nnssl_ext", "nnssl_ext.train", "submitit.core._submit")


def run_elsewhere(address: str, argv: list[str]) -> None:
    """Pass arguments, environment, folder and open files to the server, and end like the command."""
    import json
    import signal
    import socket

    # a process of multiprocessing inherits pipes and knows their numbers
    files = [0, 1, 2, *([number for number in range(3, 200) if is_open(number)] if argv[0] == "-c" else [])]
    words = {
        "executable": sys.executable,
        "argv": argv,
        "variables": dict(os.environ),
        "folder": os.getcwd(),
        "group": os.getpgrp(),
        "files": files,
    }
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:  # the server has ended
        return
    message = json.dumps(words).encode()
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], files)
    connection.sendall(message)
    answers = connection.makefile()
    process = int(answers.readline() or 0)
    if not process:
        connection.close()
        return
    for file in files[3:]:
        os.close(file)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: os.kill(process, received))
    status = int(answers.readline() or 1)
    if status < 0:  # it was killed
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def is_open(file: int) -> bool:
    """Return whether this process has inherited a file of this number."""
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


def is_command(words: list[str]) -> bool:
    """Return whether Python was called for a command of nnU-Net or of this package, or for a part of one."""
    if words[:1] == ["-m"]:
        return words[1] in MODULES
    if words[:1] == ["-c"]:
        return words[1].startswith("from multiprocessing.spawn import spawn_main")
    name = os.path.basename(words[0]) if words else ""
    return name.startswith(("nnUNetv2_", "nnssl_ext"))


words = sys.orig_argv[1:]
while words and words[0] in WITHOUT_EFFECT:
    words = words[1:]
if "NNSSL_TEST_SERVER" in os.environ and is_command(words):
    run_elsewhere(os.environ["NNSSL_TEST_SERVER"], words)
