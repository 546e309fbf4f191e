"""What a reader process does: a program that reads images, and the messages it and its parent send each other.

It imports NumPy and Pillow and no torch, so it starts in a fraction of a second; pyarrow, and what the listing of a .parquet
file needs besides, only when it is asked for the first one.

Both talk over a socket, the program's standard input: messages of a length and as many bytes, JSON, or the bytes of an
array. A request has a task and names files; the program says that it has taken it, then there is an answer to each file in
turn, sent before the next file is opened.

It ends when the socket does, also while it decodes: nothing is left of it when its parent is killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import select
import signal
import socket
import struct
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.buckets import Bucket, CropBox
from utils.data.sources.decoding import CONTENT_BYTES, BadFile, bad_image, read_mask, read_pixels, read_size
from utils.data.sources.image_files import ImageFile

NICENESS = 5
"""Readers may use every core; the process that feeds the encoder should not wait for one. On idle cores it costs nothing."""
_LENGTH = struct.Struct("!Q")
_BLOCK_BYTES = 2**20


# --- messages ----------------------------------------------------------------------------------------------------------


def send(channel: socket.socket, message: bytes) -> None:
    """Raises OSError when the other end is closed, TimeoutError (one of them) after the socket's time limit."""
    channel.sendall(_LENGTH.pack(len(message)))
    channel.sendall(message)


def receive(channel: socket.socket) -> bytearray:
    """Raises EOFError when the other end is closed, TimeoutError after the socket's time limit."""
    header = bytearray(_LENGTH.size)
    fill(channel, memoryview(header))
    message = bytearray(_LENGTH.unpack(header)[0])
    fill(channel, memoryview(message))
    return message


def fill(channel: socket.socket, place: memoryview) -> None:
    """Receive bytes up to the end of a place for them. Raises as `receive` does."""
    while place:
        num_bytes = channel.recv_into(place)
        if not num_bytes:
            raise EOFError
        place = place[num_bytes:]


def packed_file(file: ImageFile) -> list[Any]:
    """A file for JSON."""
    return [os.path.abspath(file.path), file.member, file.start, file.length]  # the other process has its own folder


def packed_box(box: CropBox) -> list[Any]:
    """A box for JSON."""
    return [box.scale, box.resized_width, box.resized_height, box.left, box.top, [box.bucket.width, box.bucket.height]]


def _unpacked_file(packed: list[Any]) -> ImageFile:
    path, member, start, length = packed
    return ImageFile(Path(path), member, start, length)


def _unpacked_box(packed: list[Any]) -> CropBox:
    scale, resized_width, resized_height, left, top, bucket = packed
    return CropBox(scale, resized_width, resized_height, left, top, Bucket(*bucket))


# --- the program -------------------------------------------------------------------------------------------------------


def main() -> None:
    """A reader process: answers requests until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is to end, the parent decides
    os.nice(NICENESS)
    warnings.filterwarnings("ignore", module="PIL")  # they name no file; what matters is an answer
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    channel = socket.socket(fileno=sys.stdin.fileno())
    os.dup2(1, 2)  # to the parent's standard error: that we started is certain now
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, requests), daemon=True).start()
    with suppress(OSError):  # the parent is gone
        send(channel, b"ready")
        while True:
            request = requests.get()
            send(channel, b"taken")
            for file in request["files"]:
                _answer(channel, request["task"], _unpacked_file(file))


def _listen(channel: socket.socket, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass on requests, and end the process when its parent is gone, whatever it is doing.

    The socket says so, unless another process has inherited the parent's end: then the operating system does.
    """
    parent = os.getppid()
    try:
        while True:
            while not select.select([channel], [], [], 1.0)[0]:
                if os.getppid() != parent:
                    return
            requests.put(json.loads(receive(channel)))
    except (OSError, EOFError):
        return
    finally:
        os._exit(0)


def _answer(channel: socket.socket, task: list[Any], file: ImageFile) -> None:
    made: Any = None
    try:
        made = _work(task, file)
        head = {"shape": made.shape, "dtype": made.dtype.name} if isinstance(made, np.ndarray) else {"value": made}
    except BadFile as bad:
        head = {"reason": bad.reason}
    except MemoryError:
        head = {"reason": "needs more memory to be read than there is"}
    except Exception:
        head = {"bug": traceback.format_exc()}
    send(channel, json.dumps(head).encode())
    if isinstance(made, np.ndarray):
        channel.sendall(made.data.cast("B"))


def _work(task: list[Any], file: ImageFile) -> Any:
    """Raises BadFile."""
    match task:
        case ["pixels", box, flipped, content]:
            return read_pixels(file, _unpacked_box(box), flipped=flipped, content=bytes.fromhex(content))
        case ["mask", box, downscale, content]:
            return read_mask(file, _unpacked_box(box), downscale, content=bytes.fromhex(content))
        case ["size"]:
            return read_size(file)
        case ["hash"]:
            return _hash(file)
        case ["parquet", image_column, caption_column]:
            return _list_table(file.path, image_column, caption_column)
    raise ValueError(f"unknown task {task}")


def _hash(file: ImageFile) -> str:
    try:
        digest = hashlib.blake2b(digest_size=CONTENT_BYTES)  # as content_hash, of files of any size
        with file.open() as content:
            while block := content.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise bad_image(file, f"cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _list_table(path: Path, image_column: str | None, caption_column: str | None) -> list[Any]:
    """What `list_parquet` returns, for JSON; of rows that cannot be used, only their names in the file."""
    from utils.data.sources.parquet_files import list_parquet  # slow to import: captions need torch for their tags' orders

    found, column, bad = list_parquet(path, image_column, caption_column)
    return [found, column, [(one.path.name, one.reason) for one in bad]]


if __name__ == "__main__":
    main()
