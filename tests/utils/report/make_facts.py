"""Facts of invented datasets with generated images: an ordinary one, and one whose texts try to break the page."""

from __future__ import annotations

import io
import math
from dataclasses import replace

from PIL import Image, ImageDraw

from utils.data.buckets import Bucket, crop_box
from utils.report.dataset_facts import BucketFacts, CutCaption, DatasetFacts, EncoderFacts, Thumbnail

ATTACK = """</style><script>alert("1")</script><img src=x onerror='alert(2)'> &amp; "double" 'single'"""
TURNED = "\u202eturned\u200f \u05e9\u05dc\u05d5\u05dd"
UNBROKEN = "x" * 5_000
SIZES = {"1024x1024": (1300, 1000), "1216x832": (2400, 1500), "832x1216": (700, 1250), "1536x640": (3000, 1000)}
"""Bucket -> size of its images."""


def jpeg(image: Image.Image, side: int = 256) -> bytes:
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def drawn(width: int, height: int, number: int) -> Image.Image:
    """A hill, a sun and a grid, so that a crop is recognisable."""
    image = Image.new("RGB", (width, height), (120 + 12 * (number % 8), 170, 235 - 20 * (number % 6)))
    pen = ImageDraw.Draw(image)
    hill = [(x, height * (0.62 + 0.14 * math.sin(4 * x / width + number))) for x in range(0, width + 20, 20)]
    pen.polygon([(0, height), *hill, (width + 20, height)], fill=(70, 120 + 10 * (number % 6), 70))
    radius = min(width, height) / 8
    centre = (width * (0.25 + 0.1 * (number % 6)), height * 0.28)
    pen.ellipse([centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius], fill=(250, 220, 120))
    for fraction in (0.25, 0.5, 0.75):
        pen.line([(width * fraction, 0), (width * fraction, height)], fill=(255, 255, 255), width=3)
    return image


def make_thumbnail(number: int, bucket: str, size: tuple[int, int], caption: str, flipped: bool = False) -> Thumbnail:
    """An image with the crop that the trainer would use."""
    width, height = size
    box = crop_box(width, height, Bucket(*map(int, bucket.split("x"))))
    left, top = box.left / box.resized_width, box.top / box.resized_height
    crop = (left, top, left + box.bucket.width / box.resized_width, top + box.bucket.height / box.resized_height)
    whole = drawn(width, height, number)
    x0, y0, x1, y1 = (round(fraction * side) for fraction, side in zip(crop, (width, height, width, height), strict=True))
    cut = whole.crop((x0, y0, x1, y1))
    encoded = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else cut
    name = f"landscapes/2024/hill_{number:03d}.jpg"
    return Thumbnail(name, caption, bucket, width, height, crop, jpeg(whole), jpeg(encoded), flipped)


def make_encoder(name: str, max_tokens: int, middle: int, num_cut: int) -> EncoderFacts:
    """Captions with about `middle` tokens."""
    bell = {tokens: round(90 * math.exp(-((3 * tokens / middle - 3) ** 2))) for tokens in range(3, 3 * middle)}
    kept = "a photograph of a hill in the morning, seen from the road below, with a pale sun over it and a few sheep " * 3
    cut = [
        CutCaption(f"landscapes/2024/hill_{index:03d}.jpg", kept, "while the mist is lifting, 35 mm film, grain", 84 + index)
        for index in range(min(num_cut, 8))
    ]
    histogram = [(tokens, count) for tokens, count in bell.items() if count]
    return EncoderFacts(name, max_tokens, histogram, num_cut, cut)


def usual_facts(per_bucket: int = 3) -> DatasetFacts:
    captions = ["a hill with a pale sun", "a hill in the morning\nsheep, mist, a road", "a hill, seen from the road. " * 30]
    thumbnails = [
        make_thumbnail(4 * index + place, bucket, size, captions[(index + place) % 3], flipped=index == 1)
        for place, (bucket, size) in enumerate(SIZES.items())
        for index in range(per_bucket)
    ]
    return DatasetFacts(
        title="Dataset of hills",
        rows=[("images", "1,412"), ("examples", "1,530"), ("captions", "1,402; 10 images have none"), ("cache", "/c")],
        buckets=[
            BucketFacts("832x1216", 310, 640, 20, 41),
            BucketFacts("1024x1024", 802, 808, 6, 0),
            BucketFacts("1216x832", 297, 304, 7, 12),
            BucketFacts("1536x640", 3, 16, 13, 0),
        ],
        thumbnails=thumbnails,
        encoders=[make_encoder("clip_l", 77, 60, 212), make_encoder("t5xxl", 256, 55, 0)],
        exposure=[(1.0, 1100), (2.0, 309), (5.3333, 3)],
        bad_files=[("landscapes/broken.jpg", "is cut off"), ("landscapes/empty.png", "is empty (0 bytes)")],
        num_bad=2,
        skipped=[(f"landscapes/tiny_{index}.png", "is smaller than min_pixels: 200x180") for index in range(14)],
        num_skipped=31,
        duplicates=[["landscapes/a.jpg", "landscapes/copy of a.jpg"], ["b.png", "c.png", "d.png"]],
        num_duplicates=2,
        warnings=["Bucket 1536x640 has 3 images for a global batch of 16: each is used 5 times per epoch or more."],
    )


def hostile_facts() -> DatasetFacts:
    """The ordinary facts with very many texts that try to break the page."""
    facts = usual_facts(per_bucket=1)
    texts = [ATTACK, TURNED, UNBROKEN, "\x00\x1b[31m\udce9", ATTACK + UNBROKEN]
    shapes = [("1024x64", (3000, 100)), ("64x1024", (60, 1900)), *[("1024x1024", (900, 400))] * 2, ("640x1536", (900, 400))]
    thumbnails = [
        replace(make_thumbnail(index, bucket, size, text), image=text)
        for index, (text, (bucket, size)) in enumerate(zip(texts, shapes, strict=True))
    ]
    cut = [CutCaption(text, text, text, 10**6) for text in texts]
    return replace(
        facts,
        title=ATTACK + UNBROKEN,
        rows=[(text, text) for text in texts],
        buckets=[*facts.buckets, *(BucketFacts(text, 10**9, 10**9, 0, 0) for text in texts)],
        thumbnails=[*facts.thumbnails, *thumbnails],
        encoders=[EncoderFacts(ATTACK, 77, [(2, 1), (100_000, 3_000)], 3_000, cut)],
        exposure=[(1 + index / 7, 1 + index % 5) for index in range(500)],
        bad_files=[(text + str(index), text) for index in range(2_000) for text in texts],
        num_bad=10_000,
        skipped=[(text, text) for text in texts],
        num_skipped=5,
        duplicates=[texts, [f"copy {index}" for index in range(5_000)]],
        num_duplicates=4_321,
        warnings=texts,
    )


def empty_facts() -> DatasetFacts:
    return DatasetFacts("Nothing", [], [], [], [], [], [], 0, [], 0, [], 0, [])
