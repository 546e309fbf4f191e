"""Names by content: of entries of the cache, and of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from utils.files.atomic import write_text

KEY_BYTES = 16


def content_key(*parts: str) -> bytes:
    """A name for whatever the parts describe together; 16 bytes. Where parts end counts too."""
    encoded = [part.encode("utf-8", "surrogateescape") for part in parts]
    return hashlib.blake2b(b"".join(b"%d:%b" % (len(part), part) for part in encoded), digest_size=KEY_BYTES).digest()


class FileHashes:
    """Content hashes of a model's files, remembered with their stamps so that an unchanged file is read once."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._entries: dict[str, list[Any]] = {}
        if memory.is_file():
            with contextlib.suppress(ValueError, TypeError):  # only a memory: what is lost is hashed again
                self._entries = dict(json.loads(memory.read_text()))
        self._changed = False

    def hash_of(self, path: Path) -> str:
        """32 hexadecimal digits. Raises OSError when the file cannot be read."""
        name, status = str(path.resolve()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        entry = self._entries.get(name)
        if isinstance(entry, list) and entry[:-1] == stamp:
            return str(entry[-1])
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        self._entries[name] = [*stamp, digest.hexdigest()]
        self._changed = True
        return digest.hexdigest()

    def save(self) -> None:
        """Write the memory, if anything was learnt."""
        if not self._changed:
            return
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._memory, json.dumps(self._entries))
        self._changed = False
