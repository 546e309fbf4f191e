"""The quickstart's images: a coloured shape on a coloured background, its drawing and its detection.

`draw` makes an image from (shape, colour, background). `read` recognises these three in an image, which measures how often
the trained model follows its captions. The two colours are the palette colours nearest to those of the centre and of the
corners; the shape is that of the template (in several sizes and positions) with the best overlap. Images are drawn so that
the centre is always inside the shape and the corners are always outside.

Eight combinations are held out of every training set. Each shape, colour and background in them still occurs in other
combinations, so a model that has learned to combine them generates the held-out ones too. Only the training set of the LoRA
has "pink".
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

PALETTE: dict[str, RGB] = {
    "red": (214, 36, 36),
    "green": (36, 158, 64),
    "blue": (36, 64, 214),
    "yellow": (240, 216, 48),
    "black": (24, 24, 24),
    "white": (240, 240, 240),
}
EXTRA_COLOUR = "pink"
COLOURS: dict[str, RGB] = {**PALETTE, EXTRA_COLOUR: (248, 128, 192)}
SHAPES = ("circle", "square", "triangle")

SIZE_PIXELS = 64
OVERSAMPLING = 4  # factor by which shapes are drawn larger and then averaged, because PIL does not antialias
RADII = (17.0, 21.0)  # smallest and largest, in pixels of a 64-pixel image
MAX_OFFSET = 2.0  # of the shape's centre from the image's, along x and y, same unit; with more, shapes are learned slowly
MAX_READ_OFFSET = 4.0  # larger, so that `read` recognises shapes that a model places farther from the centre


class Combination(NamedTuple):
    """The content of one image."""

    shape: str
    colour: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} on a {self.background} background"


HELD_OUT = (
    Combination("circle", "green", "white"),
    Combination("circle", "yellow", "black"),
    Combination("circle", "blue", "yellow"),
    Combination("square", "red", "yellow"),
    Combination("square", "white", "blue"),
    Combination("square", "black", "white"),
    Combination("triangle", "blue", "green"),
    Combination("triangle", "black", "red"),
)


def combinations(colours: tuple[str, ...] = tuple(PALETTE)) -> list[Combination]:
    """Returns every shape in every one of `colours` on every other palette colour, held-out ones included."""
    return [Combination(s, c, b) for s in SHAPES for c in colours for b in PALETTE if c != b]


def training_combinations() -> list[Combination]:
    """Returns the 82 combinations of the six palette colours that are not held out."""
    return [combination for combination in combinations() if combination not in HELD_OUT]


def parse(caption: str) -> Combination | None:
    """Returns the content described by "a red circle on a blue background"; None for other texts."""
    match = re.fullmatch(r"a (\w+) (\w+) on a (\w+) background", caption.strip().lower())
    if match is None:
        return None
    colour, shape, background = match.groups()
    known = colour in COLOURS and shape in SHAPES and background in COLOURS
    return Combination(shape, colour, background) if known else None


def _outline(shape: str, radius: float, x: float, y: float) -> list[tuple[float, float]]:
    """Returns the corners of a square or an upright triangle; the sizes make all three shapes look equally large."""
    if shape == "square":
        half = 0.88 * radius
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    angles = [math.radians(degrees) for degrees in (-90, 30, 150)]
    return [(x + 1.25 * radius * math.cos(a), y + 1.25 * radius * math.sin(a)) for a in angles]


def _coverage(shape: str, radius: float, dx: float, dy: float, size: int) -> Image.Image:
    """Returns an 'L' image of how much of each pixel the shape covers; lengths are those of a 64-pixel image."""
    scale = size * OVERSAMPLING / SIZE_PIXELS
    x, y, radius = (SIZE_PIXELS / 2 + dx) * scale, (SIZE_PIXELS / 2 + dy) * scale, radius * scale
    mask = Image.new("L", (size * OVERSAMPLING,) * 2)
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        pen.polygon(_outline(shape, radius, x, y), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def draw(
    shape: str,
    colour: str,
    background: str,
    rng: np.random.Generator,
    size: int = SIZE_PIXELS,
    max_offset: float = MAX_OFFSET,
) -> Image.Image:
    """Returns an RGB image of the shape with a random size and position near the centre."""
    radius = rng.uniform(*RADII)
    dx, dy = rng.uniform(-max_offset, max_offset, 2)
    image = Image.new("RGB", (size, size), COLOURS[background])
    image.paste(COLOURS[colour], mask=_coverage(shape, radius, dx, dy, size))
    return image


@functools.cache
def _templates() -> tuple[list[str], FloatArray]:
    """Returns the shape's name and the flat coverage in [0, 1] of each template, (T,) and (T, 64 * 64)."""
    offsets = np.linspace(-MAX_READ_OFFSET, MAX_READ_OFFSET, 5)
    radii = np.linspace(*RADII, 4)
    keys = [(s, r, dx, dy) for s in SHAPES for r in radii for dx in offsets for dy in offsets]
    masks = [np.asarray(_coverage(*key, SIZE_PIXELS), dtype=np.float32).reshape(-1) / 255 for key in keys]
    return [key[0] for key in keys], np.stack(masks)


def _nearest_colour(rgb: FloatArray) -> str:
    distances = {name: float(np.abs(rgb - np.array(value)).sum()) for name, value in COLOURS.items()}
    return min(distances, key=lambda name: distances[name])


def _best_shape(pixels: FloatArray, inside: FloatArray, outside: FloatArray) -> str:
    """Returns the shape whose template has the best intersection over union with the pixels of colour `inside`."""
    axis = inside - outside
    along = (pixels - outside) @ axis / max(float(axis @ axis), 1.0)  # 0: colour of the background, 1: of the shape
    seen = np.clip(along, 0, 1).reshape(-1)  # (64 * 64,)
    names, templates = _templates()
    shared = templates @ seen
    overlap = shared / (templates.sum(1) + seen.sum() - shared)
    return names[int(overlap.argmax())]


def read(image: Image.Image) -> Combination:
    """Returns the detected content of an image; other sizes and modes are converted to 64 pixels and RGB first."""
    small = image.convert("RGB").resize((SIZE_PIXELS, SIZE_PIXELS), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32)  # (64, 64, 3)
    middle = slice(SIZE_PIXELS // 2 - 3, SIZE_PIXELS // 2 + 3)
    edge = (slice(1, 7), slice(-7, -1))
    corners = np.concatenate([pixels[rows, columns].reshape(-1, 3) for rows in edge for columns in edge])
    inside = np.median(pixels[middle, middle].reshape(-1, 3), axis=0)
    outside = np.median(corners, axis=0)
    return Combination(_best_shape(pixels, inside, outside), _nearest_colour(inside), _nearest_colour(outside))
