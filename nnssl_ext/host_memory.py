"""Keep freed memory of a training on the CPU.

By default, the system fills each new array with zeros, 4 KiB at a time, and takes freed arrays back at once. For
arrays of tens of MiB, this is up to a third of the time of a step. ``keep_memory`` asks torch for huge pages (arrays
from 2 MiB on) and glibc to keep arrays of up to 2 GiB, in this process and in those that it starts. Systems without
either ignore it. The setting ``keep_host_memory=false`` turns it off.
"""

from __future__ import annotations

import ctypes
import os
import sys

#: torch's own variable. It is read at the first large array.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
#: glibc's variables and their numbers in malloc.h: from how many bytes on an array is returned to the system.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}
#: Sizes to try. glibc before 2.35 refuses more than 32 MiB.
MAX_KEPT = (2**31 - 1, 32 << 20)


def keep_memory(device: str) -> None:
    """Keep memory in huge pages if ``device`` is the CPU. Variables that are set already stay."""
    if device != "cpu":
        return
    os.environ.setdefault(HUGE_PAGES, "1")
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or any(name in os.environ for name in KEPT_MEMORY):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    from_size, _ = KEPT_MEMORY.values()
    kept = next((size for size in MAX_KEPT if mallopt(from_size, size)), 0)
    for name, parameter in KEPT_MEMORY.items() if kept else ():
        # both or none: either alone would only stop glibc from adapting its own limits
        os.environ[name] = str(kept)
        mallopt(parameter, kept)
