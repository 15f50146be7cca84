"""Which other process of a job no longer answers: said before JAX ends the job, or where it would wait for ever."""

from __future__ import annotations

import atexit
import itertools
import socket
import threading
from collections import Counter
from typing import Any

from sae_jax.progress import console

SECONDS = 5.0  # between two signs of life
SIGNS = 12  # that may be missing before it is said
KEY = "sae_jax/alive"


def watch(client: Any, process: int) -> None:
    """Give signs of life to the other processes of a job, and say which of them has given none for a minute.

    Args:
        client: of JAX's coordination service, which the first process keeps.
        process: the index of this one.
    """
    signs, ended = Signs(client, process), threading.Event()
    threads = [threading.Thread(target=act, args=(ended,), daemon=True) for act in (signs.exchange, signs.compare)]
    for thread in threads:
        thread.start()

    def end() -> None:
        ended.set()
        for thread in threads:
            thread.join(SECONDS)

    atexit.register(end)  # before JAX takes the client away


class Signs:
    """What the processes of a job have last shown of themselves: a number that grows, and their host."""

    def __init__(self, client: Any, process: int) -> None:
        self._client, self._process = client, process
        self._number = 0
        self._others: dict[str, str] = {}

    def exchange(self, ended: threading.Event) -> None:
        """Give a sign and read those of the others, again and again. It stands still while the first process does."""
        for number in itertools.count(1):
            try:
                sign = f"{number} {socket.gethostname()}"
                self._client.key_value_set(f"{KEY}/{self._process}", sign, allow_overwrite=True)
                found = {key.rpartition("/")[2]: sign for key, sign in self._client.key_value_dir_get(KEY)}
            except Exception:  # the first process is gone, which JAX says
                ended.set()
                return
            if ended.wait(SECONDS):
                return
            self._number, self._others = number, found

    def compare(self, ended: threading.Event) -> None:
        """Say who has given no sign for as long as SIGNS of them take, and who does again."""
        seen: dict[str, str] = {}
        missing: Counter[str] = Counter()
        number = 0
        while not ended.wait(SECONDS):
            stands_still, number = self._number == number, self._number
            signs = {"0": seen.get("0", "")} if stands_still else self._others
            for other in signs.keys() - {str(self._process)}:
                if signs[other] != seen.get(other):
                    if missing[other] >= SIGNS:
                        console.print(f"process {other} answers again")
                    missing[other] = 0
                else:
                    missing[other] += 1
                if missing[other] == SIGNS:
                    host = signs[other].partition(" ")[2] or "another host"
                    console.print(f"process {other} on {host} has not answered for {SIGNS * SECONDS:.0f} s")
            seen |= signs
