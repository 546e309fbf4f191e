"""Processes that read images, so that a run neither waits for decoders nor dies of one.

In this process one thread for each reader process hands it a request and waits for the answers; what is asked for comes as
a Future. What such a process does and what is said to it is in `reader_process.py`. multiprocessing's pools were rejected:
they import the main module again, may not be started by daemonic processes, outlive a parent that was killed, and do not say
what a process that died was working on.

There is an answer to each file in turn, sent before the next file is opened. So when a process dies (a decoder's crash, the
kernel short of memory) or takes too long, the file that is to blame is the first without answer. For the same reason
.parquet files are listed there: a damaged one may make pyarrow end the process that it is in.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from utils.data.buckets import CropBox
from utils.data.sources.archive_entries import ArchiveEntry
from utils.data.sources.decoding import BadFile, bad_image
from utils.data.sources.image_files import ImageFile
from utils.data.sources.reader_process import fill, packed_box, packed_file, receive, send

START_SECONDS = 120.0
"""How long a process may take to start: what it imports may lie on a slow network drive."""
TABLE_SECONDS = 3600.0
"""How long listing a .parquet file may take: all its captions are read, and without statistics its images too."""
_PROGRAM = "utils.data.sources.reader_process"
_ROOT = Path(__file__).resolve().parents[3]


class Readers:
    """Processes that read images; started when they are first needed, ended by `close`.

    A future raises BadFile for an image that cannot be read, also if the process that read it died or took longer than
    limit_seconds for this file; RuntimeError if processes cannot be started at all; CancelledError after `close`.
    """

    def __init__(self, num_workers: int, *, limit_seconds: float = 120.0) -> None:
        self._limit_seconds = limit_seconds
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="readers")
        self._lock = threading.Lock()
        self._idle: list[_ReaderProcess] = []
        self._running: set[_ReaderProcess] = set()
        self._closed = False

    def pixels(self, file: ImageFile, box: CropBox, *, flipped: bool = False, content: bytes = b"") -> Future[np.ndarray]:
        """What `read_pixels` returns."""
        return self._threads.submit(self._read, file, ["pixels", packed_box(box), flipped, content.hex()])

    def mask(self, file: ImageFile, box: CropBox, downscale: int, *, content: bytes = b"") -> Future[np.ndarray]:
        """What `read_mask` returns."""
        return self._threads.submit(self._read, file, ["mask", packed_box(box), downscale, content.hex()])

    def sizes(self, files: Sequence[ImageFile]) -> Future[list[tuple[int, int] | str]]:
        """Of each file what `read_size` returns, or the reason why it has no size. A request should have some hundred."""
        return self._threads.submit(lambda: [_size(answer) for answer in self._answers(files, ["size"])])

    def hashes(self, files: Sequence[ImageFile]) -> Future[list[bytes | str]]:
        """Of each file the blake2b digest of its bytes (16 bytes), or the reason why it cannot be read."""
        return self._threads.submit(lambda: [_digest(answer) for answer in self._answers(files, ["hash"])])

    def parquet(
        self, path: Path, image_column: str | None, caption_column: str | None
    ) -> Future[tuple[list[ArchiveEntry], str, list[BadFile]]]:
        """What `list_parquet` returns. Takes up to TABLE_SECONDS, whatever the limit."""
        return self._threads.submit(self._list_parquet, path, ["parquet", image_column, caption_column])

    def close(self) -> None:
        """End all processes; what has not been read is cancelled."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()  # no more: its thread may be about to read what it says
        self._threads.shutdown()
        for process in list(self._running):
            self._end(process)

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    # --- in the threads -----------------------------------------------------------------------------------------------

    def _read(self, file: ImageFile, task: list[Any]) -> np.ndarray:
        """The array that a task makes of one file."""
        array: np.ndarray = self._answer(file, task, self._limit_seconds)["array"]
        return array

    def _list_parquet(self, path: Path, task: list[Any]) -> tuple[list[ArchiveEntry], str, list[BadFile]]:
        found, column, bad = self._answer(ImageFile(path), task, TABLE_SECONDS)["value"]
        return [ArchiveEntry(*one) for one in found], column, [BadFile(path / name, reason) for name, reason in bad]

    def _answer(self, file: ImageFile, task: list[Any], limit_seconds: float) -> dict[str, Any]:
        """What a task makes of one file. Raises BadFile."""
        try:
            with self._asked(task, [file]) as process:
                answer = process.answer(limit_seconds)
        except _Lost as lost:
            raise bad_image(file, lost.reason) from None
        if "reason" in answer:
            raise bad_image(file, answer["reason"])
        return answer

    def _answers(self, files: Sequence[ImageFile], task: list[Any]) -> list[dict[str, Any]]:
        """The answer to each file. One at which a process died is tried alone: others may have left it in disorder."""
        answers: list[dict[str, Any]] = []
        while len(answers) < len(files):
            try:
                self._append_answers(answers, files[len(answers) :], task)
            except _Lost as lost:
                guilty = files[len(answers)]
                answers.append({"reason": lost.reason} if lost.too_slow else self._answer_alone(guilty, task))
        return answers

    def _append_answers(self, answers: list[dict[str, Any]], files: Sequence[ImageFile], task: list[Any]) -> None:
        with self._asked(task, files) as process:
            for _ in files:
                answers.append(process.answer(self._limit_seconds))

    def _answer_alone(self, file: ImageFile, task: list[Any]) -> dict[str, Any]:
        answers: list[dict[str, Any]] = []
        try:
            with self._asked(task, [file], fresh=True) as process:
                answers.append(process.answer(self._limit_seconds))
        except _Lost as lost:
            return {"reason": lost.reason}
        return answers[0]

    @contextmanager
    def _asked(self, task: list[Any], files: Sequence[ImageFile], *, fresh: bool = False) -> Iterator[_ReaderProcess]:
        """A process that works at this task. Whatever is raised inside ends it: it may have more to say."""
        process = self._ask(task, files, fresh)
        try:
            yield process
        except BaseException:
            self._end(process)
            if self._closed:
                raise CancelledError from None
            raise
        with self._lock:
            self._idle.append(process)

    def _ask(self, task: list[Any], files: Sequence[ImageFile], fresh: bool) -> _ReaderProcess:
        while True:
            with self._lock:
                idle = self._idle.pop() if self._idle and not fresh else None
            process = idle or self._start()
            if process.ask(task, files):
                return process
            self._end(process)
            if self._closed:
                raise CancelledError
            if idle is None:  # others may have been killed while they did nothing: no image's fault
                raise RuntimeError("a process that reads images ended before it was given any")

    def _start(self) -> _ReaderProcess:
        process = _ReaderProcess()
        with self._lock:
            self._running.add(process)
            closed = self._closed
        try:
            if closed:
                raise CancelledError
            process.wait_until_ready()
        except BaseException:
            self._end(process)
            if self._closed:
                raise CancelledError from None
            raise
        return process

    def _end(self, process: _ReaderProcess) -> None:
        process.end()
        with self._lock:
            self._running.discard(process)


class _Lost(Exception):
    """A process that will not answer, and why."""

    def __init__(self, reason: str, too_slow: bool) -> None:
        super().__init__(reason, too_slow)
        self.reason = reason
        self.too_slow = too_slow


class _ReaderProcess:
    """One reader process, as its parent sees it."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # its standard error until it is ready; from then on it has ours
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", _PROGRAM]  # -P: `utils` is ours, not one of the current folder
        try:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=2,  # the program makes it its standard error
                stderr=self._errors,
                env=_environment(),
                process_group=0,  # Ctrl-C is not for it
            )
        except OSError as error:
            self._socket.close()
            raise RuntimeError(f"a process that reads images could not be started: {error}") from error
        finally:
            theirs.close()

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the last lines it wrote if it ended instead."""
        try:
            self._socket.settimeout(START_SECONDS)
            receive(self._socket)
        except (OSError, EOFError) as error:
            how = self._how_it_ended()
            self._errors.seek(0)
            last_lines = self._errors.read().decode(errors="replace").strip().splitlines()[-10:]
            text = "\n".join([f"a process that reads images could not start ({how}):", *last_lines])
            raise RuntimeError(text) from error
        self._errors.close()

    def ask(self, task: list[Any], files: Sequence[ImageFile]) -> bool:
        """Whether it is still there to take the request."""
        request = {"task": task, "files": [packed_file(file) for file in files]}
        try:
            self._socket.settimeout(START_SECONDS)
            send(self._socket, json.dumps(request).encode())
            receive(self._socket)
        except (OSError, EOFError):
            return False
        return True

    def answer(self, limit_seconds: float) -> dict[str, Any]:
        """Of the next file: {"reason": …}, {"value": …} or {"array": …}. Raises _Lost, and RuntimeError for our own bugs."""
        try:
            self._socket.settimeout(limit_seconds)
            answer: dict[str, Any] = json.loads(receive(self._socket))
            if "shape" in answer:
                array = np.empty(answer["shape"], dtype=answer["dtype"])
                fill(self._socket, array.data.cast("B"))
                answer = {"array": array}
        except TimeoutError:
            raise _Lost(f"took longer than {limit_seconds:g} s to read", True) from None
        except (OSError, EOFError):
            raise _Lost(f"the process that read it died ({self._how_it_ended()})", False) from None
        if "bug" in answer:
            raise RuntimeError(f"in a process that reads images:\n{answer['bug']}")
        return answer

    def kill(self) -> None:
        """May be called from any thread, and again."""
        self._process.kill()

    def end(self) -> None:
        """Kill it, if it still runs, and free what belongs to it."""
        self._process.kill()
        self._process.wait()
        self._socket.close()
        self._errors.close()

    def _how_it_ended(self) -> str:
        """Of a process that closed its socket, which is the last it does."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)
        self._process.kill()
        code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _environment() -> dict[str, str]:
    """The program finds `utils` wherever it starts; one thread is enough, as there are several processes."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _size(answer: dict[str, Any]) -> tuple[int, int] | str:
    return str(answer["reason"]) if "reason" in answer else (answer["value"][0], answer["value"][1])


def _digest(answer: dict[str, Any]) -> bytes | str:
    return str(answer["reason"]) if "reason" in answer else bytes.fromhex(answer["value"])
