"""Work beside the main thread: things made ready before they are asked for, and things finished after they are handed over.

What fails in the other thread is raised in this one, at the next turn.
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


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items, each made by another thread while earlier ones are used; at most `depth` wait to be used."""
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
        except BaseException as error:  # noqa: B036  it is raised where the items are used
            hand_over(error)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        stopped.set()


class Behind(Generic[T]):
    """Another thread that finishes things one after the other; at most `depth` wait for it."""

    def __init__(self, finish: Callable[[T], None], depth: int) -> None:
        self._finish, self._depth = finish, depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._waiting: deque[Future[None]] = deque()

    def put(self, item: T) -> None:
        """Hand over; waits while too much is waiting."""
        self._waiting.append(self._thread.submit(self._finish, item))
        while self._waiting and (len(self._waiting) > self._depth or self._waiting[0].done()):
            self._waiting.popleft().result()

    def __enter__(self) -> Behind[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """Everything is finished; after an error in this thread, only what has begun."""
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._waiting:
                future.result()
