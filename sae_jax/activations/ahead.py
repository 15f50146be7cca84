"""An iterator that a thread runs ahead of its consumer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()
_POLL_SECONDS = 0.1  # between looks at whether the consumer has gone


class Ahead(Iterator[T], Generic[T]):
    """Items of an iterable, `n` of them made before they are asked for. A context manager; leaving it ends the thread.

    What the iterable raises is raised in its place.
    """

    def __init__(self, items: Iterable[T], n: int, name: str) -> None:
        self.wait_seconds = 0.0  # that the consumer has waited so far
        self._queue: Queue = Queue(n)
        self._gone = Event()
        self._thread = Thread(target=self._run, args=(items,), name=name, daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        began = time.perf_counter()
        item, error = self._queue.get()
        self.wait_seconds += time.perf_counter() - began
        if error is not None:
            self._queue.put((_END, error))  # whoever asks again gets the same answer
            raise error
        return item

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._gone.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=_POLL_SECONDS)
            except Empty:
                self._thread.join(_POLL_SECONDS)

    def _run(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if not self._put(item, None):
                    return
        except BaseException as error:
            self._put(_END, error)
        else:
            self._put(_END, StopIteration())

    def _put(self, item: object, error: BaseException | None) -> bool:
        while not self._gone.is_set():
            try:
                self._queue.put((item, error), timeout=_POLL_SECONDS)
                return True
            except Full:
                continue
        return False
