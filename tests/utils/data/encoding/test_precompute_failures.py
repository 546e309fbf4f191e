"""Caching with bad files, NaN outputs and interruptions: failures are reported, and finished entries are kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from models.family import EncodedItem
from tests.tiny_model import write_image
from tests.utils.data.caching import CachingSetup, FakeFamily, bad_paths, cache_alone, damage_image, unusable_keys
from utils.data.cache.shards import ShardWriter
from utils.data.encoding import encoder_loop, precompute
from utils.data.encoding.precompute import CachingError


def test_images_that_break_after_the_scan_are_reported_and_the_rest_is_encoded(caching: CachingSetup) -> None:
    examples = caching.examples(resolutions=[32, 64])
    broken = caching.images / "image_001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    missing = caching.images / "image_002.png"
    missing.unlink()
    cached = cache_alone(FakeFamily(caching.folder), [examples], [""], caching.settings)
    assert bad_paths(cached) == [broken, missing]
    assert all(bad.reason for bad in cached.unusable.bad_files)
    assert unusable_keys(cached) == [[f"0/image_00{index}.png@{size}" for index in (1, 2) for size in (32, 64)]]
    usable = cached.tables[0].where(~cached.unusable.examples[0])
    assert all(cached.data.latents(example).shape == (3,) for example in usable)


def test_an_image_that_changes_before_it_is_read_is_not_cached_under_its_old_hash(
    caching: CachingSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = caching.images / "image_001.png", precompute.make_plan

    def change_image(*arguments: Any) -> Any:
        write_image(caching.folder, 7).replace(path)
        return real(*arguments)

    before = path.read_bytes()
    with monkeypatch.context() as changing:
        changing.setattr(precompute, "make_plan", change_image)
        cached = caching.run(FakeFamily(caching.folder))
    assert [str(bad) for bad in cached.unusable.bad_files] == [
        f"{path}: has changed since the run started; start the run again"
    ]
    assert unusable_keys(cached) == [["0/image_001.png@32"]]
    assert caching.encode() == (1, 0, 0)
    path.write_bytes(before)
    assert caching.encode() == (1, 0, 0), "the old content had not been encoded"


def test_evaluation_images_that_are_copies_of_training_images_are_reported(
    caching: CachingSetup, capsys: pytest.CaptureFixture[str]
) -> None:
    other = caching.folder / "other"
    other.mkdir()
    for name in ("image_001.png", "image_002.png"):
        (other / name).write_bytes((caching.images / name).read_bytes())
        (other / name).with_suffix(".txt").write_text("a copy")
    write_image(other, 9)
    tables = [caching.examples(), caching.scan(directory=[{"path": other}]).examples]
    missing = [caching.images / "image_000.png", other / "image_009.png"]
    for path in missing:
        path.unlink()
    cached = cache_alone(FakeFamily(caching.folder), tables, [], caching.settings)
    assert bad_paths(cached) == sorted(missing), "unread files do not count as copies of each other"
    assert "note: 2 images of evaluation sets are copies of training images" in capsys.readouterr().out
    cache_alone(FakeFamily(caching.folder), tables[:1], [], caching.settings)
    assert "note: " not in capsys.readouterr().out


def test_all_copies_of_an_image_that_cannot_be_decoded_are_reported(caching: CachingSetup) -> None:
    """Copies share one cache entry, so none of them can be used in training."""
    damaged = damage_image(caching.images / "image_001.png")
    copy = caching.images / "image_001_copy.png"
    copy.write_bytes(damaged.read_bytes())
    copy.with_suffix(".txt").write_text("a copy")
    assert caching.scan().bad_files == []
    cached = caching.run(FakeFamily(caching.folder))
    assert bad_paths(cached) == [damaged, copy]
    assert unusable_keys(cached) == [["0/image_001.png@32", "0/image_001_copy.png@32"]]


def test_a_bad_file_is_unusable_in_every_table(caching: CachingSetup) -> None:
    damaged = damage_image(caching.images / "image_001.png")
    tables = [caching.examples(), caching.scan(resolutions=[48]).examples]
    cached = cache_alone(FakeFamily(caching.folder), tables, [""], caching.settings)
    assert bad_paths(cached) == [damaged]
    assert unusable_keys(cached) == [["0/image_001.png@32"], ["0/image_001.png@48"]]


def test_a_bad_file_is_read_again_and_used_once_it_is_fixed(caching: CachingSetup) -> None:
    path = caching.images / "image_001.png"
    whole = path.read_bytes()
    damage_image(path)
    caching.run(FakeFamily(caching.folder))
    assert bad_paths(caching.run(FakeFamily(caching.folder))) == [path]
    path.write_bytes(whole)
    family = FakeFamily(caching.folder)
    cached = caching.run(family)
    assert (family.counts, cached.unusable.bad_files, unusable_keys(cached)) == ((1, 0, 0), [], [[]])


def test_nan_outputs_are_never_cached(caching: CachingSetup) -> None:
    caption = caching.examples()[1].caption()
    family = FakeFamily(caching.folder)
    family.clip.nan_input = caption
    cached = caching.run(family, resolutions=[32, 64])
    (bad,) = cached.unusable.bad_files
    assert bad.path == caching.images / "image_001.png"
    assert bad.reason == "its caption is encoded to NaN or Inf by clip_l"
    assert unusable_keys(cached) == [["0/image_001.png@32", "0/image_001.png@64"]]
    with pytest.raises(KeyError):
        cached.data.text(caption)
    family = FakeFamily(caching.folder)
    cached = caching.run(family)
    assert (family.counts, cached.unusable.bad_files) == ((0, 1, 0), [])


def test_all_images_of_a_caption_with_nan_output_are_unusable(caching: CachingSetup) -> None:
    for index in (0, 2):
        (caching.images / f"image_{index:03d}.txt").write_text("NaN")
    family = FakeFamily(caching.folder)
    family.t5.nan_input = "NaN"
    cached = caching.run(family)
    assert unusable_keys(cached) == [["0/image_000.png@32", "0/image_002.png@32"]]
    assert [path.name for path in bad_paths(cached)] == ["image_000.png", "image_002.png"]


def test_a_prompt_with_nan_output_raises_an_error(caching: CachingSetup) -> None:
    family = FakeFamily(caching.folder)
    family.clip.nan_input = "a prompt of no image"
    with pytest.raises(CachingError, match="'a prompt of no image' is encoded to NaN or Inf by clip_l"):
        cache_alone(family, [caching.examples()], ["", "a prompt of no image"], caching.settings)


def test_shards_written_before_an_interruption_are_kept(caching: CachingSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run encodes only the entries that had not been written."""

    class OneEach(ShardWriter):
        def __init__(self, folder: Path, writer: str) -> None:
            super().__init__(folder, writer, max_bytes=1)

    monkeypatch.setattr(encoder_loop, "ShardWriter", OneEach)
    family = FakeFamily(caching.folder)
    real_value = family.image_encoder.value

    def fail_at_the_third(item: Any) -> EncodedItem:
        if len(family.image_encoder.encoded) == 3:
            deadline = time.monotonic() + 10  # results are written by another thread
            while len(list((caching.folder / "cache").glob("vae-*/*/*.safetensors"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return real_value(item)

    monkeypatch.setattr(family.image_encoder, "value", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        caching.run(family)
    family = FakeFamily(caching.folder)
    caching.run(family)
    assert family.counts == (2, 5, 5)


def test_an_error_in_the_writing_thread_is_raised(caching: CachingSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(ShardWriter):
        def _write(self, group: str, entries: Any) -> None:
            raise OSError(28, "No space left on device")

        def __init__(self, folder: Path, writer: str) -> None:
            super().__init__(folder, writer, max_bytes=1)

    monkeypatch.setattr(encoder_loop, "ShardWriter", Full)
    with pytest.raises(OSError, match="No space left on device"):
        caching.run(FakeFamily(caching.folder))
