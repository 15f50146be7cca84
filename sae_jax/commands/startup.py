"""What has to happen before a command imports anything large."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def restart_with_huge_pages(argv: list[str]) -> None:
    """Start over with large arrays in pages of 2 MiB, where a program that trains on the CPU has to ask for them.

    XLA takes the memory of a step anew each time; in pages of 4 KiB a fifth of a step went to the kernel handing them
    out (d=768, n=32768, batch 2048: 0.67 s became 0.55). Only the C library can ask, and reads this only at its start.
    """
    pages, set_already = Path("/sys/kernel/mm/transparent_hugepage/enabled"), os.environ.get("GLIBC_TUNABLES", "")
    has_accelerator = any(next(Path("/dev").glob(pattern), None) for pattern in ("nvidia*", "accel*", "kfd"))
    if argv[:1] not in (["train"], ["sweep"], ["demo"]) or has_accelerator or "hugetlb" in set_already:
        return
    try:
        asks = "[madvise]" in pages.read_text()
    except OSError:  # not Linux
        return
    if asks and sys.executable:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (set_already, "glibc.malloc.hugetlb=1")))
        with contextlib.suppress(OSError):  # then it goes on, more slowly
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
