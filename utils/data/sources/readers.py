"""A pool of reader processes, which decode images in parallel and isolate the run from crashing decoders.

Each reader process is served by one thread of this process, which sends it a request and waits for the replies; results are
Futures. The program and the protocol are in `reader_process.py`. The pools of multiprocessing were rejected: they import the
main module again, cannot be started by daemonic processes, outlive a parent that was killed, and do not report what a dead
process was working on.

The program replies to each file before it opens the next one. So if a process dies (a decoder crash, the out-of-memory
killer) or exceeds the time limit, the file that caused it is the first one without a reply. .parquet files are listed there
as well, since a damaged one may make pyarrow terminate its process.
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
from utils.data.sources.reader_process import pack_box, pack_file, receive, receive_into, send

START_SECONDS = 120.0
"""Timeout for starting a process, whose modules may be on a slow network drive."""
TABLE_SECONDS = 3600.0
"""Timeout for listing a .parquet file: reads all captions and, without column statistics, all images."""
_PROGRAM = "utils.data.sources.reader_process"
_ROOT = Path(__file__).resolve().parents[3]


class Readers:
    """A pool of reader processes, which are started on demand and ended by `close`.

    A future raises BadFile for an image that cannot be read, including when its process died or took longer than
    `limit_seconds` for this file; RuntimeError if processes cannot be started; CancelledError after `close`.
    """

    def __init__(self, num_workers: int, *, limit_seconds: float = 120.0) -> None:
        self._limit_seconds = limit_seconds
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="readers")
        self._lock = threading.Lock()
        self._idle: list[_ReaderProcess] = []
        self._running: set[_ReaderProcess] = set()
        self._closed = False

    def pixels(
        self, file: ImageFile, box: CropBox, *, flipped: bool = False, expected_hash: bytes = b""
    ) -> Future[np.ndarray]:
        """Calls `read_pixels` in a reader process."""
        return self._threads.submit(self._read, file, ["pixels", pack_box(box), flipped, expected_hash.hex()])

    def mask(self, file: ImageFile, box: CropBox, downscale: int, *, expected_hash: bytes = b"") -> Future[np.ndarray]:
        """Calls `read_mask` in a reader process."""
        return self._threads.submit(self._read, file, ["mask", pack_box(box), downscale, expected_hash.hex()])

    def sizes(self, files: Sequence[ImageFile]) -> Future[list[tuple[int, int] | str]]:
        """Returns the `read_size` of each file, or the reason why it failed. Requests should have a few hundred files."""
        return self._threads.submit(lambda: [_size(reply) for reply in self._replies(files, ["size"])])

    def hashes(self, files: Sequence[ImageFile]) -> Future[list[bytes | str]]:
        """Returns the blake2b digest (16 bytes) of each file's bytes, or the reason why it cannot be read."""
        return self._threads.submit(lambda: [_digest(reply) for reply in self._replies(files, ["hash"])])

    def parquet(
        self, path: Path, image_column: str | None, caption_column: str | None
    ) -> Future[tuple[list[ArchiveEntry], str, list[BadFile]]]:
        """Calls `list_parquet` in a reader process. The timeout is TABLE_SECONDS instead of `limit_seconds`."""
        return self._threads.submit(self._list_parquet, path, ["parquet", image_column, caption_column])

    def close(self) -> None:
        """Ends all processes and cancels what has not been read."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()  # only kills it: its thread may still be reading from its socket
        self._threads.shutdown()
        for process in list(self._running):
            self._end(process)

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    # --- in the threads -----------------------------------------------------------------------------------------------

    def _read(self, file: ImageFile, task: list[Any]) -> np.ndarray:
        """Returns the array that a task produces from one file. Raises BadFile."""
        array: np.ndarray = self._reply(file, task, self._limit_seconds)["array"]
        return array

    def _list_parquet(self, path: Path, task: list[Any]) -> tuple[list[ArchiveEntry], str, list[BadFile]]:
        entries, column, bad_rows = self._reply(ImageFile(path), task, TABLE_SECONDS)["value"]
        bad_files = [BadFile(path / name, reason) for name, reason in bad_rows]
        return [ArchiveEntry(*entry) for entry in entries], column, bad_files

    def _reply(self, file: ImageFile, task: list[Any], limit_seconds: float) -> dict[str, Any]:
        """Runs a task on one file and returns the reply. Raises BadFile."""
        try:
            with self._request(task, [file]) as process:
                reply = process.reply(limit_seconds)
        except _NoReply as failure:
            raise bad_image(file, failure.reason) from None
        if "reason" in reply:
            raise bad_image(file, reply["reason"])
        return reply

    def _replies(self, files: Sequence[ImageFile], task: list[Any]) -> list[dict[str, Any]]:
        """Returns the reply for each file. A file at which a process died is retried in a fresh process: an earlier file may
        have corrupted the process."""
        replies: list[dict[str, Any]] = []
        while len(replies) < len(files):
            try:
                self._append_replies(replies, files[len(replies) :], task)
            except _NoReply as failure:
                failed = files[len(replies)]
                replies.append({"reason": failure.reason} if failure.timed_out else self._retry(failed, task))
        return replies

    def _append_replies(self, replies: list[dict[str, Any]], files: Sequence[ImageFile], task: list[Any]) -> None:
        with self._request(task, files) as process:
            for _ in files:
                replies.append(process.reply(self._limit_seconds))

    def _retry(self, file: ImageFile, task: list[Any]) -> dict[str, Any]:
        replies: list[dict[str, Any]] = []
        try:
            with self._request(task, [file], fresh=True) as process:
                replies.append(process.reply(self._limit_seconds))
        except _NoReply as failure:
            return {"reason": failure.reason}
        return replies[0]

    @contextmanager
    def _request(self, task: list[Any], files: Sequence[ImageFile], *, fresh: bool = False) -> Iterator[_ReaderProcess]:
        """Provides a process that has accepted the request. An exception inside ends the process, which may have unread
        replies."""
        process = self._send(task, files, fresh)
        try:
            yield process
        except BaseException:
            self._end(process)
            if self._closed:
                raise CancelledError from None
            raise
        with self._lock:
            self._idle.append(process)

    def _send(self, task: list[Any], files: Sequence[ImageFile], fresh: bool) -> _ReaderProcess:
        while True:
            with self._lock:
                idle = self._idle.pop() if self._idle and not fresh else None
            process = idle or self._start()
            if process.request(task, files):
                return process
            self._end(process)
            if self._closed:
                raise CancelledError
            if idle is None:  # an idle process may have been killed earlier, which is no image's fault
                raise RuntimeError("a reader process exited before it accepted a request")

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


class _NoReply(Exception):
    """A reader process died or timed out before it replied."""

    def __init__(self, reason: str, timed_out: bool) -> None:
        super().__init__(reason, timed_out)
        self.reason = reason
        self.timed_out = timed_out


class _ReaderProcess:
    """The parent's side of one reader process."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # its standard error until it is ready; afterwards it shares ours
        self._socket, remote = socket.socketpair()
        command = [sys.executable, "-P", "-m", _PROGRAM]  # -P: never import a `utils` from the working directory
        try:
            self._process = subprocess.Popen(
                command,
                stdin=remote.fileno(),
                stdout=2,  # becomes its standard error once it is ready
                stderr=self._errors,
                env=_environment(),
                process_group=0,  # Ctrl-C must not reach it
            )
        except OSError as error:
            self._socket.close()
            raise RuntimeError(f"a reader process could not be started: {error}") from error
        finally:
            remote.close()

    def wait_until_ready(self) -> None:
        """Waits until the process has started. Raises RuntimeError with its last error lines if it exits instead."""
        try:
            self._socket.settimeout(START_SECONDS)
            receive(self._socket)
        except (OSError, EOFError) as error:
            how = self._how_it_ended()
            self._errors.seek(0)
            last_lines = self._errors.read().decode(errors="replace").strip().splitlines()[-10:]
            text = "\n".join([f"a reader process could not start ({how}):", *last_lines])
            raise RuntimeError(text) from error
        self._errors.close()

    def request(self, task: list[Any], files: Sequence[ImageFile]) -> bool:
        """Sends a request; returns whether the process accepted it, False if it has exited."""
        request = {"task": task, "files": [pack_file(file) for file in files]}
        try:
            self._socket.settimeout(START_SECONDS)
            send(self._socket, json.dumps(request).encode())
            receive(self._socket)
        except (OSError, EOFError):
            return False
        return True

    def reply(self, limit_seconds: float) -> dict[str, Any]:
        """Receives the reply for the next file: {"reason": …}, {"value": …} or {"array": …}. Raises _NoReply, and
        RuntimeError for bugs in the program."""
        try:
            self._socket.settimeout(limit_seconds)
            reply: dict[str, Any] = json.loads(receive(self._socket))
            if "shape" in reply:
                array = np.empty(reply["shape"], dtype=reply["dtype"])
                receive_into(self._socket, array.data.cast("B"))
                reply = {"array": array}
        except TimeoutError:
            raise _NoReply(f"took longer than {limit_seconds:g} s to read", True) from None
        except (OSError, EOFError):
            raise _NoReply(f"the process that read it died ({self._how_it_ended()})", False) from None
        if "traceback" in reply:
            raise RuntimeError(f"error in a reader process:\n{reply['traceback']}")
        return reply

    def kill(self) -> None:
        """Kills the process. May be called from any thread and more than once."""
        self._process.kill()

    def end(self) -> None:
        """Kills the process if it still runs, and frees its resources."""
        self._process.kill()
        self._process.wait()
        self._socket.close()
        self._errors.close()

    def _how_it_ended(self) -> str:
        """Describes how a process ended that has closed its socket, which happens last."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)
        self._process.kill()
        code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"exit status {code}"


def _environment() -> dict[str, str]:
    """Returns the program's environment: `utils` on the import path, and one thread, as there are several processes."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _size(reply: dict[str, Any]) -> tuple[int, int] | str:
    return str(reply["reason"]) if "reason" in reply else (reply["value"][0], reply["value"][1])


def _digest(reply: dict[str, Any]) -> bytes | str:
    return str(reply["reason"]) if "reason" in reply else bytes.fromhex(reply["value"])
