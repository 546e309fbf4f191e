"""The facts of the dataset page against counts made independently."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.data.caching import CPU, NUM_TOKENS, CachingSetup, FakeFamily
from tests.utils.data.image_makers import noise, quarters, read_pixels, save
from utils.data.batches import BatchOrder
from utils.data.buckets import Bucket
from utils.data.dataset import Dataset
from utils.data.encoding.precompute import CachedDataset
from utils.data.sources.decoding import BadFile
from utils.data.sources.readers import Readers
from utils.report.dataset_facts import DatasetFacts
from utils.report.dataset_gather import BAD_FILES, DATASET_REPORT, NUM_THUMBNAILS, Gatherer, write_bad_files, write_page

BATCH = 4


class Desk:
    """Collects the facts of a small dataset on disk."""

    def __init__(self, caching: CachingSetup) -> None:
        self.caching, self.images = caching, caching.images
        self.family = FakeFamily(caching.folder, keep_pixels=True)
        self.order: BatchOrder
        self.group = BATCH

    def gather(self, **changes: Any) -> DatasetFacts:
        cached: CachedDataset = self.caching.run(self.family, **changes)
        (table,), dataset = cached.tables, self.caching.scan(**changes)
        self.order = BatchOrder(table, BATCH, 0, self.group)
        any_family: Any = self.family
        gatherer = Gatherer(any_family, cached.data, table, self.order, 64)
        bad_files = [*dataset.bad_files, *cached.unusable.bad_files]
        return gatherer.facts("a dataset", dataset, bad_files, 100, CPU)


@pytest.fixture
def desk(tmp_path: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(CachingSetup(tmp_path, readers, monkeypatch))


# --- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, BATCH])
def test_buckets_count_images_draws_and_upscaled_images(desk: Desk, group: int) -> None:
    desk.group = group
    facts = desk.gather(resolutions=[32, 64], num_repeats=2)
    assert [(bucket.name, bucket.num_images, bucket.num_enlarged) for bucket in facts.buckets] == [
        ("16x48", 1, 0),
        ("32x32", 2, 0),
        ("48x16", 1, 0),
        ("48x96", 1, 1),
        ("64x64", 2, 2),
        ("96x48", 1, 1),
    ]
    num_epochs, num_steps = 50, desk.order.steps_per_epoch
    shown = Counter(
        str(draw.example.bucket) for step in range(num_epochs * num_steps) for draw in desk.order.global_batch(step)
    )
    for bucket in facts.buckets:
        assert bucket.shown_per_epoch == pytest.approx(shown[bucket.name] / num_epochs, abs=2 * group / num_epochs)
        assert bucket.shown_per_epoch - bucket.num_fillers == pytest.approx(2 * bucket.num_images)
    assert sum(bucket.num_fillers for bucket in facts.buckets) == pytest.approx(desk.order.num_fillers)
    assert (desk.order.num_fillers > 0) == (group > 2), "each bucket has two or four draws"
    assert dict(facts.rows)["epoch"] == f"{num_steps} steps; draws of examples: {desk.order.epoch_draws()}"


@pytest.mark.parametrize("repeats", [1, 2.5, 0.25])
def test_draws_of_all_images_sum_to_those_of_all_buckets(desk: Desk, repeats: float) -> None:
    more = desk.caching.folder / "more"
    more.mkdir()
    for index in range(8):
        save(quarters(40, 40), more / f"{index}.png").with_suffix(".txt").write_text("")
    directories = [{"path": desk.images, "num_repeats": 3}, {"path": more, "num_repeats": repeats}]
    facts = desk.gather(directory=directories, resolutions=[32, 64])
    assert sum(count for _, count in facts.exposure) == 4 + 8
    total = sum(value * count for value, count in facts.exposure)
    assert total == pytest.approx(sum(bucket.shown_per_epoch for bucket in facts.buckets), abs=0.005 * 12)
    assert list(facts.exposure) == sorted(facts.exposure)


def test_bucket_that_an_epoch_may_not_use_is_listed(desk: Desk) -> None:
    """With num_repeats = 0.1, a bucket with one image has no draw in most epochs."""
    facts = desk.gather(num_repeats=0.1)
    assert {bucket.name for bucket in facts.buckets} <= {"16x48", "32x32", "48x16"}
    assert all(np.isfinite(value) for value, _ in facts.exposure)


def test_summary_counts_files_examples_and_distinct_captions(desk: Desk) -> None:
    (desk.images / "image_001.txt").write_text((desk.images / "image_000.txt").read_text())
    rows = dict(desk.gather(resolutions=[32, 64]).rows)
    assert rows["images"] == "4 files"
    assert rows["examples"] == "8: every image at every resolution (32 and 64)"
    assert rows["captions"].startswith("3 ")
    assert rows["run"] == f"100 steps: {100 / desk.order.steps_per_epoch:.2f} epochs"
    assert str(desk.caching.folder / "cache") in rows["cache"]


def test_files_with_equal_content_are_grouped_and_links_are_not(desk: Desk) -> None:
    copies = [desk.images / name for name in ("b_copy.png", "image_001.png", "z_copy.png")]
    for path in (copies[0], copies[2]):
        path.write_bytes(copies[1].read_bytes())
        path.with_suffix(".txt").write_text("a copy")
    facts = desk.gather(resolutions=[32, 64])
    assert (facts.duplicates, facts.num_duplicates) == ([[str(path) for path in copies]], 1)
    for path in (copies[0], copies[2]):
        path.unlink()
        os.link(copies[1], path)
    assert desk.gather(resolutions=[32, 64]).num_duplicates == 0


# --- captions ----------------------------------------------------------------------------------------------------------


def test_caption_lengths_count_each_caption_of_an_image_once(desk: Desk) -> None:
    for index, caption in enumerate(["abc", "abcd", "abc", "abcdefg"]):
        (desk.images / f"image_00{index}.txt").write_text(caption)
    facts = desk.gather(resolutions=[32, 64])
    assert [encoder.name for encoder in facts.encoders] == ["clip_l", "t5xxl"]
    for encoder in facts.encoders:
        assert (encoder.max_tokens, encoder.histogram, encoder.num_cut) == (NUM_TOKENS, [(3, 2), (4, 1), (7, 1)], 1)
        (cut,) = encoder.cut
        assert (cut.kept, cut.cut, cut.num_tokens) == ("abcd", "efg", 7)
        assert cut.image == str(desk.images / "image_003.png")


def test_each_tag_order_is_truncated_at_its_own_place(desk: Desk) -> None:
    for index in range(4):
        (desk.images / f"image_00{index}.txt").write_text("a, b, c, d, e")
    facts = desk.gather(cache_shuffle_num=3)
    for cut in facts.encoders[0].cut:
        assert len(cut.kept) == 4
        assert sorted((cut.kept + cut.cut).split(", ")) == list("abcde")
    assert len({cut.kept for cut in facts.encoders[0].cut}) > 1


# --- thumbnails --------------------------------------------------------------------------------------------------------


def opened(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB")).astype(np.float64)


def test_thumbnails_have_the_file_its_crop_and_the_decoded_latents(desk: Desk) -> None:
    for index, size in enumerate([(64, 64), (96, 64), (64, 96), (160, 64)]):
        save(quarters(*size), desk.images / f"image_00{index}.png")
    facts = desk.gather(enable_ar_bucket=False)
    assert len(facts.thumbnails) == 4
    table = desk.caching.examples(enable_ar_bucket=False)
    by_path = {str(example.image): example for example in table}
    for thumbnail in facts.thumbnails:
        example = by_path[thumbnail.image]
        assert (thumbnail.caption, thumbnail.bucket) == (example.caption(), "32x32")
        with Image.open(example.image.path) as image:
            assert (thumbnail.width, thumbnail.height) == image.size
        original, encoded = opened(thumbnail.original), opened(thumbnail.encoded)
        assert original.shape == (thumbnail.height, thumbnail.width, 3)
        expected = read_pixels(example.image.path, example.box).permute(1, 2, 0).numpy()
        assert np.abs(encoded - expected).mean() < 10, "but for JPEG"
        left, top, right, bottom = thumbnail.crop
        assert (right - left) * example.box.resized_width == pytest.approx(32)
        assert (bottom - top) * example.box.resized_height == pytest.approx(32)
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    assert desk.family.tile_pixels == 64


def test_every_other_thumbnail_is_flipped_where_flips_are_trained(desk: Desk) -> None:
    for path in desk.images.glob("*.png"):
        save(quarters(64, 64), path)
    straight, flipped = (desk.gather(horizontal_flip=flip).thumbnails for flip in (False, True))
    assert not any(thumbnail.flipped for thumbnail in straight)
    assert [thumbnail.flipped for thumbnail in flipped] == [False, True, False, True]
    for plain, other in zip(straight, flipped, strict=True):
        pixels = opened(plain.encoded)[:, ::-1] if other.flipped else opened(plain.encoded)
        assert np.abs(opened(other.encoded).astype(int) - pixels).mean() < 10, "but for JPEG"


def test_every_bucket_has_thumbnails_and_the_selection_is_fixed(desk: Desk) -> None:
    for index in range(10, 10 + NUM_THUMBNAILS):
        save(noise(40, 40), desk.images / f"more_{index}.png").with_suffix(".txt").write_text("more")
    facts = desk.gather()
    counts = Counter(thumbnail.bucket for thumbnail in facts.thumbnails)
    assert counts == {"32x32": NUM_THUMBNAILS // 3, "48x16": 1, "16x48": 1}
    again = desk.gather()
    assert [one.image for one in again.thumbnails] == [one.image for one in facts.thumbnails]


def test_large_images_are_scaled_down(desk: Desk) -> None:
    save(noise(800, 600), desk.images / "image_000.png")
    facts = desk.gather(resolutions=[512])
    thumbnail = next(one for one in facts.thumbnails if one.image.endswith("image_000.png"))
    assert (thumbnail.width, thumbnail.height) == (800, 600)
    assert max(opened(thumbnail.original).shape[:2]) == max(opened(thumbnail.encoded).shape[:2]) == 256


def test_image_removed_after_encoding_has_no_thumbnail(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    load_decoder, gone = desk.family.load_decoder, desk.images / "image_001.png"

    def remove_one(device: torch.device, tile_pixels: int) -> Any:
        gone.unlink()
        return load_decoder(device, tile_pixels)

    monkeypatch.setattr(desk.family, "load_decoder", remove_one)
    facts = desk.gather()
    assert len(facts.thumbnails) == 3
    assert str(gone) not in {thumbnail.image for thumbnail in facts.thumbnails}


# --- files -------------------------------------------------------------------------------------------------------------


def test_bad_and_skipped_files_are_on_the_page(desk: Desk) -> None:
    bad = desk.images / "image_001.png"
    bad.write_bytes(b"nothing")
    facts = desk.gather(max_pixels=40 * 45)
    assert ([path for path, _ in facts.bad_files], facts.num_bad) == ([str(bad)], 1)
    assert [Path(path).name for path, _ in facts.skipped] == ["image_002.png"]
    assert facts.num_skipped == 1
    assert dict(facts.rows)["images"] == "2 files"


def test_every_skipped_file_is_listed_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset(bad_files=[BadFile(Path("a.png"), "is bad")], skipped=[BadFile(Path("b.png"), "is small")])
    write_bad_files(tmp_path / "new", dataset, [BadFile(Path('c "ü".png'), "is damaged")])
    lines = [json.loads(line) for line in (tmp_path / "new" / BAD_FILES).read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"path": "a.png", "kind": "bad", "reason": "is bad"},
        {"path": 'c "ü".png', "kind": "bad", "reason": "is damaged"},
        {"path": "b.png", "kind": "skipped", "reason": "is small"},
    ]
    printed = capsys.readouterr().out
    assert printed.startswith("2 bad files, 1 skipped by configuration") and str(tmp_path / "new" / BAD_FILES) in printed


def test_list_is_removed_once_no_file_is_bad(tmp_path: Path) -> None:
    write_bad_files(tmp_path, Dataset(bad_files=[BadFile(Path("a.png"), "is bad")]), [])
    write_bad_files(tmp_path, Dataset(), [])
    assert not (tmp_path / BAD_FILES).exists()
    write_bad_files(tmp_path / "none", Dataset(), [])
    assert not (tmp_path / "none").exists(), "no folder is created without need"


def test_page_is_written_with_the_collected_facts(desk: Desk) -> None:
    path = write_page(desk.caching.folder / "output", desk.gather())
    assert path == desk.caching.folder / "output" / DATASET_REPORT
    page = path.read_text(encoding="utf-8")
    assert "a dataset" in page and str(Bucket(48, 16)) in page and "a yellow circle" in page
