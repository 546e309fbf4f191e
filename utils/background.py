"""Background threads: preparing items before they are used, and finishing items after they are handed over.

An exception in the background thread is raised in the calling thread, at its next call.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.5


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yields the items; a thread computes them in advance and keeps at most `depth` unused ones."""
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def hand_over(entry: tuple[T] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                hand_over((item,))
                if stopped.is_set():
                    return
            hand_over(None)
        except BaseException as error:  # noqa: B036  raised in the calling thread
            hand_over(error)

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        stopped.set()


class BackgroundWorker(Generic[T]):
    """Calls `finish` on each item, in order, in another thread; at most `depth` items wait. A context manager."""

    def __init__(self, finish: Callable[[T], None], depth: int) -> None:
        self._finish, self._depth = finish, depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="background worker")
        self._waiting: deque[Future[None]] = deque()

    def put(self, item: T) -> None:
        """Hands an item over; blocks while more than `depth` items wait."""
        self._waiting.append(self._thread.submit(self._finish, item))
        while self._waiting and (len(self._waiting) > self._depth or self._waiting[0].done()):
            self._waiting.popleft().result()

    def __enter__(self) -> BackgroundWorker[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Waits until all items are finished; after an exception in the calling thread, until the current one is."""
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._waiting:
                future.result()
