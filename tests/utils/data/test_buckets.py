"""Aspect-ratio buckets and crops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from utils.data.buckets import Bucket, bucket_of_ratio, crop_box, make_buckets, nearest_buckets

MULTIPLE = 16
SIZES = [(640, 427), (427, 640), (1000, 872), (512, 512), (33, 400), (4000, 31), (1, 1), (17, 16), (1411, 1411), (100, 37)]


def nearest_bucket(width: int, height: int, buckets: list[Bucket]) -> Bucket:
    """Returns the bucket of one image."""
    (place,) = nearest_buckets(np.array([[width, height]]), buckets).tolist()
    return buckets[place]


@pytest.mark.parametrize("resolution", [64, 512, 1024])
@pytest.mark.parametrize("num_buckets", [1, 2, 3, 7, 20])
def test_sides_are_multiples_and_areas_are_near_resolution_squared(resolution: int, num_buckets: int) -> None:
    for bucket in make_buckets(resolution, 0.5, 2.0, num_buckets, MULTIPLE):
        assert bucket.width % MULTIPLE == bucket.height % MULTIPLE == 0
        ideal = bucket_of_ratio(resolution, bucket.width / bucket.height, MULTIPLE)
        assert abs(bucket.width - ideal.width) <= MULTIPLE
        assert abs(math.log(bucket.width * bucket.height / resolution**2)) < 3 * MULTIPLE / resolution


def test_buckets_of_1024_contain_common_image_sizes() -> None:
    buckets = make_buckets(1024, 0.5, 2.0, 7, MULTIPLE)
    assert Bucket(1024, 1024) in buckets
    assert Bucket(1440, 720) in buckets or Bucket(1456, 720) in buckets
    assert len(buckets) == 7


@pytest.mark.parametrize("num_buckets", [1, 2, 4, 7])
def test_buckets_are_distinct_sorted_and_contain_the_square(num_buckets: int) -> None:
    buckets = make_buckets(256, 0.5, 2.0, num_buckets, MULTIPLE)
    assert Bucket(256, 256) in buckets
    assert len(set(buckets)) == len(buckets)
    assert buckets == sorted(buckets)


def test_buckets_are_symmetric_in_portrait_and_landscape() -> None:
    buckets = make_buckets(512, 0.5, 2.0, 9, MULTIPLE)
    assert {Bucket(bucket.height, bucket.width) for bucket in buckets} == set(buckets)


def test_ratios_span_the_range_evenly_in_the_logarithm() -> None:
    buckets = make_buckets(4096, 0.25, 4.0, 5, 1)
    logarithms = sorted(math.log(bucket.width / bucket.height) for bucket in buckets)
    expected = [math.log(0.25) + index * math.log(2) for index in range(5)]
    assert logarithms == pytest.approx(expected, abs=2e-3)


def test_sides_are_at_least_one_multiple() -> None:
    assert all(min(bucket.width, bucket.height) >= 16 for bucket in make_buckets(16, 0.01, 100.0, 9, 16))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_nearest_bucket_crops_the_least(width: int, height: int) -> None:
    """Nearest in the logarithm of the ratio means that the largest fraction of the image is kept."""
    buckets = make_buckets(256, 0.5, 2.0, 7, 1)
    chosen = nearest_bucket(width, height, buckets)

    def kept(bucket: Bucket) -> float:
        ratio = (bucket.width / bucket.height) / (width / height)
        return min(ratio, 1 / ratio)

    assert kept(chosen) == pytest.approx(max(kept(bucket) for bucket in buckets))


def test_the_nearest_bucket_does_not_depend_on_the_order_of_buckets() -> None:
    buckets = [Bucket(32, 64), Bucket(64, 32)]
    assert nearest_bucket(10, 10, buckets) == nearest_bucket(10, 10, buckets[::-1])


def test_of_two_equally_near_buckets_the_smaller_is_chosen() -> None:
    assert nearest_bucket(10, 10, [Bucket(64, 32), Bucket(32, 64)]) == Bucket(32, 64)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float64])
def test_buckets_of_many_images_equal_those_of_single_images(dtype: type) -> None:
    buckets = make_buckets(256, 0.5, 2.0, 7, 16)
    together = nearest_buckets(np.array(SIZES, dtype), buckets)
    assert [buckets[place] for place in together.tolist()] == [nearest_bucket(*size, buckets) for size in SIZES]
    assert nearest_buckets(np.zeros((0, 2), dtype), buckets).tolist() == []


PLACES = [None, 0.0, 0.3, 0.5, 1 - 2**-53]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("bucket", [Bucket(32, 32), Bucket(16, 48), Bucket(1024, 512)])
@pytest.mark.parametrize("place", PLACES)
def test_the_resized_image_covers_its_bucket_and_keeps_its_aspect_ratio(
    width: int, height: int, bucket: Bucket, place: float | None
) -> None:
    box = crop_box(width, height, bucket, place)
    assert box.left >= 0
    assert box.top >= 0
    assert box.left + bucket.width <= box.resized_width
    assert box.top + bucket.height <= box.resized_height
    assert box.resized_width == bucket.width or box.resized_height == bucket.height
    scale = max(bucket.width / width, bucket.height / height)
    assert abs(box.resized_width - width * scale) <= 0.5
    assert abs(box.resized_height - height * scale) <= 0.5
    assert box.scale == scale


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_crop_without_position_is_centred(width: int, height: int) -> None:
    box = crop_box(width, height, Bucket(32, 48))
    assert abs((box.resized_width - 32) - 2 * box.left) <= 1
    assert abs((box.resized_height - 48) - 2 * box.top) <= 1


def test_crop_positions_are_uniform_and_reach_both_ends() -> None:
    """A crop of 32 of 40 pixels has nine possible positions."""
    lefts = Counter(crop_box(40, 32, Bucket(32, 32), index / 900).left for index in range(900))
    assert sorted(lefts) == list(range(9))
    assert all(abs(count - 100) <= 1 for count in lefts.values())
    assert {crop_box(40, 32, Bucket(32, 32), place).top for place in (0.0, 0.9)} == {0}
    tops = [crop_box(30, 90, Bucket(30, 30), place).top for place in (0.0, 0.5, 1 - 2**-53)]
    assert tops == [0, 30, 60]


def test_an_image_of_the_size_of_its_bucket_is_not_changed() -> None:
    for place in PLACES:
        box = crop_box(48, 16, Bucket(48, 16), place)
        assert (box.resized_width, box.resized_height, box.left, box.top) == (48, 16, 0, 0)


def test_different_geometries_have_different_keys() -> None:
    buckets = (Bucket(32, 32), Bucket(16, 48))
    boxes = [crop_box(*size, bucket, place) for size in SIZES for bucket in buckets for place in PLACES]
    geometries = {(box.resized_width, box.resized_height, box.left, box.top, box.bucket) for box in boxes}
    assert len({box.key() for box in boxes}) == len(geometries)
