"""The reader process: a program that reads images, and the protocol between it and its parent.

The program imports NumPy and Pillow but not torch, so it starts in a fraction of a second. It imports pyarrow and the other
modules for .parquet files on the first request that needs them.

Protocol: parent and program exchange messages over a socket, the program's standard input. A message is its length and that
many bytes: JSON, or the contents of an array. A request contains a task and a list of files. The program acknowledges it and
then sends one reply per file, in order, each before it opens the next file.

The process exits when the socket is closed, even while it decodes, so it never outlives a parent that was killed.
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
from utils.data.sources.decoding import HASH_BYTES, BadFile, bad_image, read_mask, read_pixels, read_size
from utils.data.sources.image_files import ImageFile

NICENESS = 5
"""Reader processes may use every core, but must not slow down the process that feeds the encoder."""
_LENGTH = struct.Struct("!Q")
_BLOCK_BYTES = 2**20


# --- messages ----------------------------------------------------------------------------------------------------------


def send(channel: socket.socket, message: bytes) -> None:
    """Sends one message. Raises OSError if the other end is closed; its subclass TimeoutError after the socket's timeout."""
    channel.sendall(_LENGTH.pack(len(message)))
    channel.sendall(message)


def receive(channel: socket.socket) -> bytearray:
    """Receives one message. Raises EOFError if the other end is closed, TimeoutError after the socket's timeout."""
    header = bytearray(_LENGTH.size)
    receive_into(channel, memoryview(header))
    message = bytearray(_LENGTH.unpack(header)[0])
    receive_into(channel, memoryview(message))
    return message


def receive_into(channel: socket.socket, buffer: memoryview) -> None:
    """Receives bytes until the buffer is full. Raises the same errors as `receive`."""
    while buffer:
        num_bytes = channel.recv_into(buffer)
        if not num_bytes:
            raise EOFError
        buffer = buffer[num_bytes:]


def pack_file(file: ImageFile) -> list[Any]:
    """Converts a file to JSON values. The path is absolute: the other process has its own working directory."""
    return [os.path.abspath(file.path), file.member, file.start, file.length]


def pack_box(box: CropBox) -> list[Any]:
    """Converts a crop box to JSON values."""
    return [box.scale, box.resized_width, box.resized_height, box.left, box.top, [box.bucket.width, box.bucket.height]]


def _unpack_file(packed: list[Any]) -> ImageFile:
    path, member, start, length = packed
    return ImageFile(Path(path), member, start, length)


def _unpack_box(packed: list[Any]) -> CropBox:
    scale, resized_width, resized_height, left, top, bucket = packed
    return CropBox(scale, resized_width, resized_height, left, top, Bucket(*bucket))


# --- the program -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs a reader process: handles requests until the parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    os.nice(NICENESS)
    warnings.filterwarnings("ignore", module="PIL")  # they name no file; errors are sent as replies
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    channel = socket.socket(fileno=sys.stdin.fileno())
    os.dup2(1, 2)  # from here on, the parent's standard error: the start succeeded
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, requests), daemon=True).start()
    with suppress(OSError):  # the parent has exited
        send(channel, b"ready")
        while True:
            request = requests.get()
            send(channel, b"accepted")
            for file in request["files"]:
                _reply(channel, request["task"], _unpack_file(file))


def _listen(channel: socket.socket, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Queues incoming requests, and exits the process when the parent has exited, whatever the main thread is doing.

    The socket is closed with the parent, unless another process inherited its end: so the parent's process id is polled too.
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


def _reply(channel: socket.socket, task: list[Any], file: ImageFile) -> None:
    """Runs a task on one file and sends the result, the reason why the file is bad, or the traceback of a bug."""
    result: Any = None
    try:
        result = _work(task, file)
        is_array = isinstance(result, np.ndarray)
        head = {"shape": result.shape, "dtype": result.dtype.name} if is_array else {"value": result}
    except BadFile as bad:
        head = {"reason": bad.reason}
    except MemoryError:
        head = {"reason": "needs more memory to be read than is available"}
    except Exception:
        head = {"traceback": traceback.format_exc()}
    send(channel, json.dumps(head).encode())
    if isinstance(result, np.ndarray):
        channel.sendall(result.data.cast("B"))


def _work(task: list[Any], file: ImageFile) -> Any:
    """Runs a task on one file. Raises BadFile."""
    match task:
        case ["pixels", box, flipped, expected_hash]:
            return read_pixels(file, _unpack_box(box), flipped=flipped, expected_hash=bytes.fromhex(expected_hash))
        case ["mask", box, downscale, expected_hash]:
            return read_mask(file, _unpack_box(box), downscale, expected_hash=bytes.fromhex(expected_hash))
        case ["size"]:
            return read_size(file)
        case ["hash"]:
            return _hash(file)
        case ["parquet", image_column, caption_column]:
            return _list_table(file.path, image_column, caption_column)
    raise ValueError(f"unknown task {task}")


def _hash(file: ImageFile) -> str:
    try:
        digest = hashlib.blake2b(digest_size=HASH_BYTES)  # equals content_hash, for files of any size
        with file.open() as content:
            while block := content.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise bad_image(file, f"cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _list_table(path: Path, image_column: str | None, caption_column: str | None) -> list[Any]:
    """Returns the result of `list_parquet` as JSON values; bad rows by their names in the file."""
    from utils.data.sources.parquet_files import list_parquet  # slow to import

    entries, column, bad_rows = list_parquet(path, image_column, caption_column)
    return [entries, column, [(bad.path.name, bad.reason) for bad in bad_rows]]


if __name__ == "__main__":
    main()
