"""Unusable images of every kind that occurs in large datasets, and unusual valid ones; each with a caption."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from tests.utils.data.image_makers import noise, quarters

Maker = Callable[[np.random.Generator], bytes]

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "avif": "AVIF"}
UNUSUAL_SIZE = (48, 32)
"""Width and height of every unusual image, after EXIF rotation."""


# --- bad images --------------------------------------------------------------------------------------------------------


def make_bad_images(folder: Path, count: int = 200, seed: int = 0) -> dict[str, str]:
    """Writes `count` unusable images and their captions; returns name -> kind of defect."""
    generator = np.random.default_rng(seed)
    contents, special_files = _contents(), _special_files()
    kinds = [*contents, *special_files]
    made = {}
    for number in range(count):
        kind, suffix = kinds[number % len(kinds)]
        path = folder / f"bad{number:04d}.{suffix}"
        if (kind, suffix) in special_files:
            special_files[kind, suffix](path)
        else:
            path.write_bytes(contents[kind, suffix](generator))
        path.with_suffix(".txt").write_text(f"an image that is bad: {kind}")
        made[path.name] = kind
    return made


def _contents() -> dict[tuple[str, str], Maker]:
    """Returns (kind of defect, suffix) -> function that creates the file's content."""
    made: dict[tuple[str, str], Maker] = {("truncated", suffix): _truncated(name) for suffix, name in FORMATS.items()}
    made |= {("only the first bytes", suffix): _first_bytes(name) for suffix, name in FORMATS.items()}
    made |= {("damaged in the middle", "png"): _damaged_png, ("a wrong checksum", "png"): _wrong_checksum}
    made |= {("empty", suffix): lambda _: b"" for suffix in ("jpg", "png")}
    made |= {("text", "png"): lambda _: b"no image here\n", ("a web page", "jpg"): _web_page}
    made |= {("random bytes", "webp"): lambda generator: generator.bytes(5000), ("zeros", "jpg"): lambda _: bytes(4096)}
    made |= {("declares 60000x60000 pixels", "png"): lambda _: _declaring(60000, 60000)}
    made |= {("declares 60000x60000 pixels", "bmp"): lambda _: _huge_bitmap(), ("declares no pixels", "png"): _no_pixels}
    made |= {("wrong magic", "png"): lambda _: b"\x89PNX" + _encoded("PNG")[4:], ("no pixels", "jpg"): _jpeg_header}
    made |= {("random bytes after a header", "jpg"): _random_jpeg, ("random bytes after a header", "gif"): _random_gif}
    made |= {("floating point", "tif"): _floating_point, ("PostScript", "png"): lambda _: _encoded("EPS")}
    made |= {("one pixel high", "png"): lambda _: _thin(400, 1), ("one pixel wide", "jpg"): lambda _: _thin(1, 400)}
    made |= {("a header without an image", "avif"): _empty_box, ("an archive", "jpg"): lambda _: b"PK\x03\x04" * 50}
    return made


def _special_files() -> dict[tuple[str, str], Callable[[Path], object]]:
    """Returns (kind of defect, suffix) -> function that creates an entry that is not a regular file."""
    made: dict[tuple[str, str], Callable[[Path], object]] = {
        ("a folder", "png"): Path.mkdir,
        ("a broken link", "jpg"): lambda path: path.symlink_to(path.with_name("nowhere.jpg")),
        ("a link to itself", "png"): lambda path: path.symlink_to(path.name),
        ("a pipe", "gif"): os.mkfifo,
    }
    if os.geteuid() != 0:  # root can read everything
        made["no permission", "png"] = lambda path: path.touch(0)
    return made


def _encoded(name: str, image: Image.Image | None = None) -> bytes:
    file = io.BytesIO()
    (noise(64, 48) if image is None else image).save(file, name)
    return file.getvalue()


def _truncated(name: str) -> Maker:
    def make(generator: np.random.Generator) -> bytes:
        content = _encoded(name)
        return content[: int(len(content) * generator.uniform(0.2, 0.97))]

    return make


def _first_bytes(name: str) -> Maker:
    return lambda generator: _encoded(name)[: int(generator.integers(1, 25))]


def _damaged_png(generator: np.random.Generator) -> bytes:
    content = bytearray(_encoded("PNG"))
    start = len(content) // 2 + int(generator.integers(-1000, 1000))
    content[start : start + 64] = bytes(64)
    return _with_end_marker(content, generator)


def _with_end_marker(content: bytearray, generator: np.random.Generator) -> bytes:
    """Keeps the end marker, with or without a byte after it, as on a camera's damaged memory card."""
    return bytes(content) + (b"" if generator.random() < 0.5 else b"\x00")


def _wrong_checksum(_: np.random.Generator) -> bytes:
    content = bytearray(_encoded("PNG"))
    content[29] ^= 255  # in the header
    return bytes(content)


def _web_page(_: np.random.Generator) -> bytes:
    return b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body><h1>Not Found</h1></body></html>"


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _declaring(width: int, height: int) -> bytes:
    """A PNG file whose header declares this size but which contains only a few rows of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(200_000))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _no_pixels(_: np.random.Generator) -> bytes:
    return _declaring(0, 0)


def _huge_bitmap() -> bytes:
    content = bytearray(_encoded("BMP"))
    content[18:26] = struct.pack("<ii", 60000, 60000)
    return bytes(content)


def _jpeg_header(_: np.random.Generator) -> bytes:
    content = _encoded("JPEG")
    return content[: content.index(b"\xff\xda")] + b"\xff\xd9"


def _random_jpeg(generator: np.random.Generator) -> bytes:
    return b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + generator.bytes(3000)


def _random_gif(generator: np.random.Generator) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 64, 48, 0, 0, 0) + b"\x00" + generator.bytes(3000)


def _floating_point(_: np.random.Generator) -> bytes:
    return _encoded("TIFF", Image.fromarray(np.zeros((32, 48), dtype=np.float32)))


def _thin(width: int, height: int) -> bytes:
    return _encoded("PNG" if height == 1 else "JPEG", noise(width, height))


def _empty_box(_: np.random.Generator) -> bytes:
    return _encoded("AVIF")[:32] + struct.pack(">I4s", 8, b"mdat")


# --- unusual images ----------------------------------------------------------------------------------------------------


def make_unusual_images(folder: Path) -> dict[str, str]:
    """Writes unusual but valid images of UNUSUAL_SIZE, and captions; returns name -> kind.

    Images with equal stems share a caption.
    """
    for name, kind in _UNUSUAL.items():
        path = folder / name
        _write_unusual(path, kind)
        path.with_suffix(".txt").write_text(f"an unusual image: {kind}")
    return dict(_UNUSUAL)


_UNUSUAL = {
    "print.jpg": "CMYK",
    "deep.png": "16 bits",
    "deep.tif": "16 bits",
    "palette.png": "a palette with alpha",
    "grey_alpha.png": "LA",
    "bits.png": "1 bit",
    "film.gif": "animated",
    "film.webp": "animated",
    "film.png": "animated",
    "gif_in_truth.jpg": "wrong suffix",
    "jpeg_in_truth.png": "wrong suffix",
    "png_in_truth.webp": "wrong suffix",
    "turned.jpg": "EXIF turned",
    "turned.webp": "EXIF turned",
    "long.jpg": "bytes after the end",
    "long.png": "bytes after the end",
    "long.gif": "bytes after the end",
    "progressive.jpg": "progressive",
    "interlaced.gif": "interlaced",
    "comments.png": "long texts",
    "exif.jpg": "broken EXIF",
    "Umlaut ä\tö.JPG": "its name",
}


def _write_unusual(path: Path, kind: str) -> None:
    image, suffix = quarters(*UNUSUAL_SIZE), path.suffix[1:].lower()
    if kind == "wrong suffix":
        image.save(path, {"gif": "GIF", "jpeg": "JPEG", "png": "PNG"}[path.name.split("_")[0]])
    elif kind == "EXIF turned":
        exif = Image.Exif()
        exif[274] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    elif kind == "bytes after the end":
        path.write_bytes(_encoded(FORMATS[suffix], image) + b"made by a camera")
    elif kind == "animated":
        image.save(path, save_all=True, append_images=[Image.new("RGB", UNUSUAL_SIZE, (255, 0, 0))])
    elif kind == "long texts":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("prompt", "a fox " * 2000, zip=True)
        image.save(path, pnginfo=texts)
    elif kind == "broken EXIF":
        image.save(path, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05" + b"\xff" * 8)
    elif kind == "progressive":
        image.save(path, progressive=True)
    else:
        _in_unusual_mode(image, kind).save(path)


def _in_unusual_mode(image: Image.Image, kind: str) -> Image.Image:
    if kind == "16 bits":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if kind == "a palette with alpha":
        return image.convert("RGBA").quantize(4)
    return image.convert({"CMYK": "CMYK", "LA": "LA", "1 bit": "1"}.get(kind, "RGB"))
