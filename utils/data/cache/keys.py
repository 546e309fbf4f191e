"""Keys of cache entries: hashes of everything that an entry depends on."""

from __future__ import annotations

import hashlib

KEY_BYTES = 16


def content_key(*parts: str) -> bytes:
    """Returns a hash of the parts, 16 bytes. It depends on the boundaries between the parts too."""
    encoded = [part.encode("utf-8", "surrogateescape") for part in parts]
    return hashlib.blake2b(b"".join(b"%d:%b" % (len(part), part) for part in encoded), digest_size=KEY_BYTES).digest()
