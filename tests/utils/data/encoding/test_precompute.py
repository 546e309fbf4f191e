"""The caching pass: what is encoded, what is not encoded again, and what happens to bad files."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from models.family import EncodedItem
from tests.tiny_model import write_image
from tests.utils.data.caching import Adapter, Workshop, cache_alone
from tests.utils.data.image_makers import noise, read_pixels, save
from utils.data.cache.shards import ShardWriter
from utils.data.encoding import encoder_pass, precompute
from utils.data.encoding.encoded import latents_key
from utils.data.encoding.plan import make_plan, room_for
from utils.data.encoding.precompute import Cached, CacheError
from utils.data.examples import empty_table


def bad_paths(cached: Cached) -> list[Path]:
    return sorted(bad.path for bad in cached.unusable.bad_files)


def unusable(cached: Cached) -> list[list[str]]:
    """Keys of each table's examples that cannot be used."""
    return [
        [example.key for example in table.where(chosen)]
        for table, chosen in zip(cached.tables, cached.unusable.examples, strict=True)
    ]


def test_everything_is_encoded_once_and_read_back(workshop: Workshop) -> None:
    adapter = Adapter(workshop.folder)
    cached = workshop.run(adapter)
    data, (table,) = cached.data, cached.tables
    assert (cached.encoded_any, cached.unusable.bad_files) == (True, [])
    assert adapter.counts == (4, 5, 5)
    assert sorted(adapter.clip.encoded) == sorted({"", *(example.caption() for example in table)})
    for example in table:
        image = read_pixels(example.image.path, example.box)
        assert image.shape == (3, example.bucket.height, example.bucket.width)
        assert torch.equal(data.latents(example), image.float().mean((1, 2)))
        text = data.text(example.caption())
        assert set(text) == {f"{encoder}.{name}" for encoder in ("clip_l", "t5xxl") for name in ("sequence", "pooled")}
        assert torch.equal(text["clip_l.sequence"], adapter.clip.value(example.caption())["sequence"])
        assert data.length("t5xxl", example.caption()) == (len(example.caption()), 4)
    assert data.length("clip_l", "") == (0, 0)


def test_tables_come_back_as_they_were_given_with_hashes(workshop: Workshop) -> None:
    (table,) = workshop.run(Adapter(workshop.folder)).tables
    given = list(workshop.examples())
    assert list(table) == given
    for example in given:
        assert example.content == hashlib.blake2b(example.image.read(), digest_size=16).digest()


def test_a_full_cache_loads_no_encoder_and_reads_no_file(workshop: Workshop) -> None:
    workshop.encode()
    workshop.forget()
    adapter = Adapter(workshop.folder)
    cached = workshop.run(adapter)
    assert (adapter.counts, adapter.num_loads, cached.encoded_any) == ((0, 0, 0), 0, False)
    assert workshop.asked == []
    assert cached.data.latents(cached.tables[0][0]).shape == (3,)


def test_hashes_are_remembered_and_only_changed_files_are_hashed_again(workshop: Workshop) -> None:
    workshop.run(Adapter(workshop.folder))
    hashed = [entry for entry in workshop.asked if entry[0] == "hash"]
    assert hashed == [("hash", f"image_00{index}.png") for index in range(4)]
    write_image(workshop.folder, 8).replace(workshop.images / "image_002.png")
    workshop.forget()
    workshop.run(Adapter(workshop.folder))
    assert workshop.asked == [("hash", "image_002.png"), ("pixels", "image_002.png")]


def test_editing_a_caption_encodes_one_caption_and_no_pixel(workshop: Workshop) -> None:
    workshop.encode()
    (workshop.images / "image_002.txt").write_text("another caption")
    adapter = Adapter(workshop.folder)
    cached = workshop.run(adapter)
    assert adapter.counts == (0, 1, 1)
    assert adapter.clip.encoded == ["another caption"]
    assert cached.data.text("another caption")


def test_adding_a_image_encodes_one_image(workshop: Workshop) -> None:
    workshop.encode()
    write_image(workshop.images, 9)
    assert workshop.encode() == (1, 1, 1)


def test_removing_a_image_encodes_nothing(workshop: Workshop) -> None:
    workshop.encode()
    (workshop.images / "image_000.png").unlink()
    assert workshop.encode() == (0, 0, 0)


def test_a_image_replaced_in_place_is_encoded_again_and_read_anew(workshop: Workshop) -> None:
    before = workshop.run(Adapter(workshop.folder))
    old = before.data.latents(before.tables[0][0])
    write_image(workshop.folder, 3).replace(workshop.images / "image_000.png")
    adapter = Adapter(workshop.folder)
    workshop.run(adapter)
    assert len(adapter.image_encoder.encoded) == 0, "it is byte for byte another image that is there already"
    (workshop.images / "image_000.png").write_bytes(write_image(workshop.folder, 27).read_bytes())
    adapter = Adapter(workshop.folder)
    after = workshop.run(adapter)
    assert len(adapter.image_encoder.encoded) == 1
    assert not torch.equal(after.data.latents(after.tables[0][0]), old)


def test_a_renamed_image_is_not_encoded_again(workshop: Workshop) -> None:
    workshop.encode()
    for suffix in (".png", ".txt"):
        (workshop.images / f"image_001{suffix}").rename(workshop.images / f"renamed{suffix}")
    assert workshop.encode() == (0, 0, 0)


def test_another_geometry_encodes_images_and_no_captions(workshop: Workshop) -> None:
    workshop.encode()
    adapter = Adapter(workshop.folder)
    workshop.run(adapter, resolutions=[64])
    assert adapter.counts == (4, 0, 0)
    adapter = Adapter(workshop.folder)
    workshop.run(adapter, resolutions=[32, 64])
    assert adapter.counts == (0, 0, 0)


def test_other_settings_of_one_encoder_encode_its_captions_only(workshop: Workshop) -> None:
    workshop.encode()
    assert workshop.encode(num_tokens=16) == (0, 5, 0)
    assert workshop.encode(dtype="bfloat16") == (0, 5, 0)
    assert workshop.encode() == (0, 0, 0), "the old entries are still there"


def test_other_weights_encode_everything(workshop: Workshop) -> None:
    workshop.encode()
    (workshop.folder / "weights.safetensors").write_bytes(b"WEIGHTS, of another day")
    assert workshop.encode() == (4, 5, 5)


def test_equal_captions_and_equal_images_are_encoded_once(workshop: Workshop) -> None:
    for index in range(4):
        (workshop.images / f"image_{index:03d}.txt").write_text("all the same")
    copy = workshop.images / "copy.png"
    copy.write_bytes((workshop.images / "image_000.png").read_bytes())
    copy.with_suffix(".txt").write_text("all the same")
    adapter = Adapter(workshop.folder)
    cached = workshop.run(adapter)
    assert adapter.counts == (4, 2, 2)
    assert len({tuple(cached.data.latents(example).tolist()) for example in cached.tables[0]}) == 4


def test_every_line_and_every_order_of_tags_is_encoded_once(workshop: Workshop) -> None:
    for index in range(4):
        (workshop.images / f"image_{index:03d}.txt").write_text("a, b, c, d, e\nanother, a, b, c")
    adapter = Adapter(workshop.folder)
    cached = workshop.run(adapter, caption_per_line=True, cache_shuffle_num=3, resolutions=[32, 64])
    example = cached.tables[0][0]
    captions = {example.caption(number) for number in range(example.num_captions)}
    assert example.num_captions == 6 and len(captions) > 3
    assert sorted(adapter.clip.encoded) == sorted({"", *captions})
    assert all(cached.data.text(caption) for caption in captions)


# --- what is kept ------------------------------------------------------------------------------------------------------


def test_the_std_is_kept_when_asked_for_in_a_folder_of_its_own(workshop: Workshop) -> None:
    plain = workshop.run(Adapter(workshop.folder))
    assert plain.data.std(plain.tables[0][0]) is None
    adapter = Adapter(workshop.folder)
    both = workshop.run(adapter, settings={"posterior": True})
    assert adapter.counts == (4, 0, 0)
    assert both.data.folders.latents != plain.data.folders.latents
    for example in both.tables[0]:
        std = both.data.std(example)
        assert std is not None
        assert torch.equal(std, both.data.latents(example) / 8)
    assert workshop.encode() == (0, 0, 0), "the old entries are still there"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_texts_are_kept_in_the_precision_asked_for_in_folders_of_their_own(workshop: Workshop, dtype: str) -> None:
    plain = workshop.run(Adapter(workshop.folder))
    adapter = Adapter(workshop.folder)
    packed = workshop.run(adapter, settings={"text_dtype": dtype})
    assert adapter.counts == (0, 5, 5)
    assert packed.data.folders.latents == plain.data.folders.latents
    assert not {*packed.data.folders.texts.values()} & {*plain.data.folders.texts.values()}
    caption = packed.tables[0][0].caption()
    exact, rounded = plain.data.text(caption), packed.data.text(caption)
    assert exact.keys() == rounded.keys()
    assert rounded["clip_l.sequence"].dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert torch.allclose(exact["clip_l.sequence"], rounded["clip_l.sequence"].float(), rtol=2**-4)
    assert packed.data.length("clip_l", caption) == plain.data.length("clip_l", caption)
    assert workshop.encode() == (0, 0, 0), "the old entries are still there"


def test_a_file_s_place_in_the_cache_stays_what_it_was(workshop: Workshop) -> None:
    """Else every cache there is would be encoded anew: names of folders, and keys of images that are not flipped."""

    def digest(*parts: str) -> bytes:
        joined = b"".join(b"%d:%s" % (len(part), part.encode()) for part in parts)
        return hashlib.blake2b(joined, digest_size=16).digest()

    cached = workshop.run(Adapter(workshop.folder), **with_flips(workshop))
    for example in cached.tables[0]:
        content = hashlib.blake2b(example.image.read(), digest_size=16).hexdigest()
        expected = digest(content, example.box.key(), "pixels 1")
        assert latents_key(example.content, example.box.key()) == expected
    weights = hashlib.blake2b(b"weights", digest_size=16).hexdigest()
    identity = digest("vae", "mean", "version=1", f"weights.safetensors:{weights}").hex()
    assert cached.data.folders.latents == workshop.folder / "cache" / f"vae-{identity[:16]}"
    settings = ("dtype=float32", "num_tokens=8", f"weights.safetensors:{weights}")
    assert cached.data.folders.texts["clip_l"].name == f"clip_l-{digest('clip_l', 'None', *settings).hex()[:16]}"


# --- room --------------------------------------------------------------------------------------------------------------


class FullSize(Adapter):
    """Latents as large as their bucket says, and sequences of many numbers."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for encoder in self.text_encoders:
            encoder.shapes = {"sequence": (77, 256), "pooled": (256,)}

            def text(item: str, encoder: Any = encoder) -> EncodedItem:
                rest = {name: torch.ones(shape) for name, shape in encoder.shapes.items()}
                return {**rest, "length": torch.zeros(2, dtype=torch.int32)}

            encoder.value = text  # type: ignore[method-assign]

        def latents(item: torch.Tensor) -> EncodedItem:
            shape = (16, item.shape[1] // 8, item.shape[2] // 8)
            return {"latents": torch.ones(shape), "std": torch.ones(shape)}

        self.image_encoder.value = latents  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "settings", [{}, {"posterior": True}, {"text_dtype": "bfloat16"}, {"text_dtype": "float8_e4m3fn", "posterior": True}]
)
def test_what_it_will_take_is_what_it_takes(workshop: Workshop, settings: dict[str, Any]) -> None:
    adapter, chosen = FullSize(workshop.folder), replace(workshop.settings, **settings)
    cached = workshop.run(adapter, settings=settings, resolutions=[256], **with_flips(workshop))
    elsewhere = replace(chosen, folder=workshop.folder / "elsewhere")
    any_adapter: Any = adapter
    plan = make_plan(any_adapter, cached.tables, [""], elsewhere)
    assert [len(work.items) for work in plan.all_work().values()] == [8, 0, 5, 5]
    written = sum(path.stat().st_size for path in chosen.folder.glob("*/*/*.safetensors"))
    assert plan.num_bytes == pytest.approx(written, rel=0.02)
    without_texts = make_plan(any_adapter, cached.tables, [], elsewhere)
    assert room_for(any_adapter, cached.tables, chosen) == pytest.approx(without_texts.num_bytes, rel=0.02)


def test_a_disk_without_room_is_refused_before_anything_is_encoded(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    adapter = Adapter(workshop.folder)
    with pytest.raises(CacheError, match="has 0.0 MB left, and what is to be encoded takes .* give another cache_dir"):
        workshop.run(adapter)
    assert (adapter.counts, adapter.num_loads) == ((0, 0, 0), 0)
    usage.free = 10**9
    assert workshop.encode() == (4, 5, 5)
    usage.free = 0
    assert workshop.encode() == (0, 0, 0), "nothing more is needed"


# --- bad files ---------------------------------------------------------------------------------------------------------


def test_a_image_that_breaks_after_the_scan_is_named_and_stops_nobody(workshop: Workshop) -> None:
    examples = workshop.examples(resolutions=[32, 64])
    broken = workshop.images / "image_001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    gone = workshop.images / "image_002.png"
    gone.unlink()
    cached = cache_alone(Adapter(workshop.folder), [examples], [""], workshop.settings)
    assert bad_paths(cached) == [broken, gone]
    assert all(bad.reason for bad in cached.unusable.bad_files)
    assert unusable(cached) == [[f"0/image_00{index}.png@{size}" for index in (1, 2) for size in (32, 64)]]
    usable = cached.tables[0].where(~cached.unusable.examples[0])
    assert all(cached.data.latents(example).shape == (3,) for example in usable)


def test_a_image_that_changes_while_it_waits_is_not_cached_under_its_old_hash(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = workshop.images / "image_001.png", precompute.make_plan

    def change_it(*arguments: Any) -> Any:
        write_image(workshop.folder, 7).replace(path)
        return real(*arguments)

    before = path.read_bytes()
    with monkeypatch.context() as changing:
        changing.setattr(precompute, "make_plan", change_it)
        cached = workshop.run(Adapter(workshop.folder))
    assert [str(bad) for bad in cached.unusable.bad_files] == [f"{path}: has changed since the run began; start again"]
    assert unusable(cached) == [["0/image_001.png@32"]]
    assert workshop.encode() == (1, 0, 0)
    path.write_bytes(before)
    assert workshop.encode() == (1, 0, 0), "of the old bytes nothing had been kept"


def test_copies_of_trained_images_in_evaluation_sets_are_told_of(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    other = workshop.folder / "other"
    other.mkdir()
    for name in ("image_001.png", "image_002.png"):
        (other / name).write_bytes((workshop.images / name).read_bytes())
        (other / name).with_suffix(".txt").write_text("a copy")
    write_image(other, 9)
    tables = [workshop.examples(), workshop.scan(directory=[{"path": other}]).examples]
    gone = [workshop.images / "image_000.png", other / "image_009.png"]
    for path in gone:
        path.unlink()
    cached = cache_alone(Adapter(workshop.folder), tables, [], workshop.settings)
    assert bad_paths(cached) == sorted(gone), "which are no copies of each other"
    assert "note: 2 images of evaluation sets are copies of images that are trained on" in capsys.readouterr().out
    cache_alone(Adapter(workshop.folder), tables[:1], [], workshop.settings)
    assert "note: " not in capsys.readouterr().out


def damaged_image(path: Path) -> Path:
    """Its header and its end are right."""
    save(noise(), path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"\x00" * 64
    path.write_bytes(bytes(content))
    return path


def test_every_copy_of_a_image_that_cannot_be_decoded_is_named(workshop: Workshop) -> None:
    """Copies share one entry of the cache; training must not ask for it under any of their names."""
    damaged = damaged_image(workshop.images / "image_001.png")
    copy = workshop.images / "image_001_copy.png"
    copy.write_bytes(damaged.read_bytes())
    copy.with_suffix(".txt").write_text("a copy")
    assert workshop.scan().bad_files == []
    cached = workshop.run(Adapter(workshop.folder))
    assert bad_paths(cached) == [damaged, copy]
    assert unusable(cached) == [["0/image_001.png@32", "0/image_001_copy.png@32"]]


def test_a_bad_file_is_left_out_of_every_table_it_is_in(workshop: Workshop) -> None:
    damaged = damaged_image(workshop.images / "image_001.png")
    tables = [workshop.examples(), workshop.scan(resolutions=[48]).examples]
    cached = cache_alone(Adapter(workshop.folder), tables, [""], workshop.settings)
    assert bad_paths(cached) == [damaged]
    assert unusable(cached) == [["0/image_001.png@32"], ["0/image_001.png@48"]]


def test_a_bad_file_is_tried_anew_and_used_once_it_is_mended(workshop: Workshop) -> None:
    path = workshop.images / "image_001.png"
    whole = path.read_bytes()
    damaged_image(path)
    workshop.run(Adapter(workshop.folder))
    assert bad_paths(workshop.run(Adapter(workshop.folder))) == [path]
    path.write_bytes(whole)
    adapter = Adapter(workshop.folder)
    cached = workshop.run(adapter)
    assert (adapter.counts, cached.unusable.bad_files, unusable(cached)) == ((1, 0, 0), [], [[]])


def test_numbers_that_are_not_finite_are_never_cached(workshop: Workshop) -> None:
    caption = workshop.examples()[1].caption()
    adapter = Adapter(workshop.folder)
    adapter.clip.poison = caption
    cached = workshop.run(adapter, resolutions=[32, 64])
    (bad,) = cached.unusable.bad_files
    assert bad.path == workshop.images / "image_001.png"
    assert bad.reason == "clip_l made numbers of it that are not finite"
    assert unusable(cached) == [["0/image_001.png@32", "0/image_001.png@64"]]
    with pytest.raises(KeyError):
        cached.data.text(caption)
    adapter = Adapter(workshop.folder)
    cached = workshop.run(adapter)
    assert (adapter.counts, cached.unusable.bad_files) == ((0, 1, 0), [])


def test_every_image_of_a_caption_that_gives_no_finite_numbers_is_left_out(workshop: Workshop) -> None:
    for index in (0, 2):
        (workshop.images / f"image_{index:03d}.txt").write_text("poison")
    adapter = Adapter(workshop.folder)
    adapter.t5.poison = "poison"
    cached = workshop.run(adapter)
    assert unusable(cached) == [["0/image_000.png@32", "0/image_002.png@32"]]
    assert [path.name for path in bad_paths(cached)] == ["image_000.png", "image_002.png"]


def test_a_prompt_that_gives_no_finite_numbers_stops_the_run(workshop: Workshop) -> None:
    adapter = Adapter(workshop.folder)
    adapter.clip.poison = "a prompt of no image"
    with pytest.raises(CacheError, match="'a prompt of no image': clip_l made numbers of it that are not finite"):
        cache_alone(adapter, [workshop.examples()], ["", "a prompt of no image"], workshop.settings)


def test_an_encoder_that_fails_keeps_what_was_written_before(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted pass goes on where it stopped: shards of some entries stay."""

    class OneEach(ShardWriter):
        def __init__(self, folder: Path, writer: str) -> None:
            super().__init__(folder, writer, max_bytes=1)

    monkeypatch.setattr(encoder_pass, "ShardWriter", OneEach)
    adapter = Adapter(workshop.folder)
    real_value = adapter.image_encoder.value

    def fail_at_the_third(item: Any) -> EncodedItem:
        if len(adapter.image_encoder.encoded) == 3:
            deadline = time.monotonic() + 10  # what is finished is written by another thread
            while len(list((workshop.folder / "cache").glob("vae-*/*/*.safetensors"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return real_value(item)

    monkeypatch.setattr(adapter.image_encoder, "value", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        workshop.run(adapter)
    adapter = Adapter(workshop.folder)
    workshop.run(adapter)
    assert adapter.counts == (2, 5, 5)


def test_what_fails_while_results_are_written_stops_the_pass(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(ShardWriter):
        def _write(self, group: str, entries: Any) -> None:
            raise OSError(28, "No space left on device")

        def __init__(self, folder: Path, writer: str) -> None:
            super().__init__(folder, writer, max_bytes=1)

    monkeypatch.setattr(encoder_pass, "ShardWriter", Full)
    with pytest.raises(OSError, match="No space left on device"):
        workshop.run(Adapter(workshop.folder))


# --- flipped images -------------------------------------------------------------------------------------------------


def with_flips(workshop: Workshop) -> dict[str, Any]:
    return {"directory": [{"path": workshop.images, "horizontal_flip": True}]}


def test_flipped_latents_are_the_flipped_image_encoded(workshop: Workshop) -> None:
    """Not flipped latents: an autoencoder does not make the one of the other."""
    adapter = Adapter(workshop.folder, keep_pixels=True)
    cached = workshop.run(adapter, **with_flips(workshop))
    assert cached.unusable.bad_files == []
    assert adapter.counts == (8, 5, 5)
    data, (table,) = cached.data, cached.tables
    for example in table:
        plain, flipped = data.latents(example), data.latents(example, flipped=True)
        assert torch.equal(plain, read_pixels(example.image.path, example.box).float())
        assert torch.equal(flipped, plain.flip(-1))
    assert any(not torch.equal(data.latents(e), data.latents(e, flipped=True)) for e in table)


def test_asking_for_flips_later_encodes_the_flipped_images_only(workshop: Workshop) -> None:
    workshop.encode()
    adapter = Adapter(workshop.folder)
    workshop.run(adapter, **with_flips(workshop))
    assert adapter.counts == (4, 0, 0)
    assert workshop.encode() == (0, 0, 0)


def test_only_images_that_may_be_flipped_have_a_flipped_variant(workshop: Workshop) -> None:
    cached = workshop.run(Adapter(workshop.folder))
    with pytest.raises(KeyError):
        cached.data.latents(cached.tables[0][0], flipped=True)


def test_a_image_in_training_and_evaluation_is_encoded_once(workshop: Workshop) -> None:
    """Only training shows it flipped."""
    training = workshop.examples(**with_flips(workshop))
    evaluation = training.where(np.ones(len(training), bool), never_flipped=True)
    adapter = Adapter(workshop.folder)
    cached = cache_alone(adapter, [training, evaluation], [], workshop.settings)
    assert (adapter.counts, cached.unusable.bad_files) == ((8, 4, 4), [])
    first, second = (table[0] for table in cached.tables)
    assert (first.may_flip, second.may_flip) == (True, False)
    assert torch.equal(cached.data.latents(first), cached.data.latents(second))


def test_a_image_that_breaks_in_both_variants_is_named_once(workshop: Workshop) -> None:
    examples = workshop.examples(resolutions=[32, 64], **with_flips(workshop))
    damaged = damaged_image(workshop.images / "image_001.png")
    gone = workshop.images / "image_002.png"
    gone.unlink()
    cached = cache_alone(Adapter(workshop.folder), [examples], [""], workshop.settings)
    assert bad_paths(cached) == [damaged, gone]


def test_nothing_to_encode_is_no_pass_at_all(workshop: Workshop) -> None:
    adapter = Adapter(workshop.folder)
    cached = cache_alone(adapter, [empty_table()], [], workshop.settings)
    assert (len(cached.tables[0]), adapter.num_loads, cached.encoded_any) == (0, 0, False)
