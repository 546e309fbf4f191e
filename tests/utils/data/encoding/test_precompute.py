"""Caching: what is encoded, what is not encoded again, what is stored, and how much disk space it takes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.family import EncodedItem
from tests.tiny_model import write_image
from tests.utils.data.caching import CachingSetup, FakeFamily, cache_alone
from tests.utils.data.image_makers import read_pixels
from utils.data.cache.keys import content_key
from utils.data.encoding.encoded import latents_key
from utils.data.encoding.plan import make_plan, max_cache_bytes
from utils.data.encoding.precompute import CachingError
from utils.data.encoding.stored_names import FLIPPED_SUFFIX, POSTERIOR_MOMENTS, STORED_STD
from utils.data.examples import empty_table


def test_all_entries_are_encoded_once_and_read_back(caching: CachingSetup) -> None:
    family = FakeFamily(caching.folder)
    cached = caching.run(family)
    data, (table,) = cached.data, cached.tables
    assert (cached.encoded_any, cached.unusable.bad_files) == (True, [])
    assert family.counts == (4, 5, 5)
    assert sorted(family.clip.encoded) == sorted({"", *(example.caption() for example in table)})
    for example in table:
        image = read_pixels(example.image.path, example.box)
        assert image.shape == (3, example.bucket.height, example.bucket.width)
        assert torch.equal(data.latents(example), image.float().mean((1, 2)))
        text = data.text(example.caption())
        assert set(text) == {f"{encoder}.{name}" for encoder in ("clip_l", "t5xxl") for name in ("sequence", "pooled")}
        assert torch.equal(text["clip_l.sequence"], family.clip.value(example.caption())["sequence"])
        assert data.length("t5xxl", example.caption()) == (len(example.caption()), 4)
    assert data.length("clip_l", "") == (0, 0)


def test_returned_tables_equal_the_given_ones_and_have_hashes(caching: CachingSetup) -> None:
    (table,) = caching.run(FakeFamily(caching.folder)).tables
    given = list(caching.examples())
    assert list(table) == given
    for example in given:
        assert example.image_hash == hashlib.blake2b(example.image.read(), digest_size=16).digest()


def test_a_complete_cache_loads_no_encoder_and_reads_no_file(caching: CachingSetup) -> None:
    caching.encode()
    caching.clear_requests()
    family = FakeFamily(caching.folder)
    cached = caching.run(family)
    assert (family.counts, family.num_loads, cached.encoded_any) == ((0, 0, 0), 0, False)
    assert caching.requests == []
    assert cached.data.latents(cached.tables[0][0]).shape == (3,)


def test_hashes_are_stored_and_only_changed_files_are_hashed_again(caching: CachingSetup) -> None:
    caching.run(FakeFamily(caching.folder))
    hashed = [entry for entry in caching.requests if entry[0] == "hash"]
    assert hashed == [("hash", f"image_00{index}.png") for index in range(4)]
    write_image(caching.folder, 8).replace(caching.images / "image_002.png")
    caching.clear_requests()
    caching.run(FakeFamily(caching.folder))
    assert caching.requests == [("hash", "image_002.png"), ("pixels", "image_002.png")]


def test_editing_a_caption_encodes_one_caption_and_no_pixel(caching: CachingSetup) -> None:
    caching.encode()
    (caching.images / "image_002.txt").write_text("another caption")
    family = FakeFamily(caching.folder)
    cached = caching.run(family)
    assert family.counts == (0, 1, 1)
    assert family.clip.encoded == ["another caption"]
    assert cached.data.text("another caption")


def test_adding_an_image_encodes_one_image(caching: CachingSetup) -> None:
    caching.encode()
    write_image(caching.images, 9)
    assert caching.encode() == (1, 1, 1)


def test_removing_an_image_encodes_nothing(caching: CachingSetup) -> None:
    caching.encode()
    (caching.images / "image_000.png").unlink()
    assert caching.encode() == (0, 0, 0)


def test_an_image_replaced_in_place_is_encoded_again(caching: CachingSetup) -> None:
    before = caching.run(FakeFamily(caching.folder))
    old = before.data.latents(before.tables[0][0])
    write_image(caching.folder, 3).replace(caching.images / "image_000.png")
    family = FakeFamily(caching.folder)
    caching.run(family)
    assert len(family.image_encoder.encoded) == 0, "the new file is byte-identical to another image"
    (caching.images / "image_000.png").write_bytes(write_image(caching.folder, 27).read_bytes())
    family = FakeFamily(caching.folder)
    after = caching.run(family)
    assert len(family.image_encoder.encoded) == 1
    assert not torch.equal(after.data.latents(after.tables[0][0]), old)


def test_a_renamed_image_is_not_encoded_again(caching: CachingSetup) -> None:
    caching.encode()
    for suffix in (".png", ".txt"):
        (caching.images / f"image_001{suffix}").rename(caching.images / f"renamed{suffix}")
    assert caching.encode() == (0, 0, 0)


def test_another_geometry_encodes_images_and_no_captions(caching: CachingSetup) -> None:
    caching.encode()
    family = FakeFamily(caching.folder)
    caching.run(family, resolutions=[64])
    assert family.counts == (4, 0, 0)
    family = FakeFamily(caching.folder)
    caching.run(family, resolutions=[32, 64])
    assert family.counts == (0, 0, 0)


def test_other_settings_of_one_encoder_encode_its_captions_only(caching: CachingSetup) -> None:
    caching.encode()
    assert caching.encode(num_tokens=16) == (0, 5, 0)
    assert caching.encode(dtype="bfloat16") == (0, 5, 0)
    assert caching.encode() == (0, 0, 0), "the earlier entries have been kept"


def test_other_weights_encode_everything(caching: CachingSetup) -> None:
    caching.encode()
    (caching.folder / "weights.safetensors").write_bytes(b"other weights")
    assert caching.encode() == (4, 5, 5)


def test_equal_captions_and_equal_images_are_encoded_once(caching: CachingSetup) -> None:
    for index in range(4):
        (caching.images / f"image_{index:03d}.txt").write_text("the same caption")
    copy = caching.images / "copy.png"
    copy.write_bytes((caching.images / "image_000.png").read_bytes())
    copy.with_suffix(".txt").write_text("the same caption")
    family = FakeFamily(caching.folder)
    cached = caching.run(family)
    assert family.counts == (4, 2, 2)
    assert len({tuple(cached.data.latents(example).tolist()) for example in cached.tables[0]}) == 4


def test_every_line_and_every_order_of_tags_is_encoded_once(caching: CachingSetup) -> None:
    for index in range(4):
        (caching.images / f"image_{index:03d}.txt").write_text("a, b, c, d, e\nanother, a, b, c")
    family = FakeFamily(caching.folder)
    cached = caching.run(family, caption_per_line=True, cache_shuffle_num=3, resolutions=[32, 64])
    example = cached.tables[0][0]
    captions = {example.caption(number) for number in range(example.num_captions)}
    assert example.num_captions == 6 and len(captions) > 3
    assert sorted(family.clip.encoded) == sorted({"", *captions})
    assert all(cached.data.text(caption) for caption in captions)


# --- stored tensors -----------------------------------------------------------------------------------------------------


def test_std_is_stored_if_requested_in_a_separate_folder(caching: CachingSetup) -> None:
    plain = caching.run(FakeFamily(caching.folder))
    assert plain.data.std(plain.tables[0][0]) is None
    family = FakeFamily(caching.folder)
    both = caching.run(family, settings={"posterior": True})
    assert family.counts == (4, 0, 0)
    assert both.data.folders.latents != plain.data.folders.latents
    for example in both.tables[0]:
        std = both.data.std(example)
        assert std is not None
        assert torch.equal(std, both.data.latents(example) / 8)
    assert caching.encode() == (0, 0, 0), "the earlier entries have been kept"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_text_embeddings_of_each_precision_have_a_separate_folder(caching: CachingSetup, dtype: str) -> None:
    plain = caching.run(FakeFamily(caching.folder))
    family = FakeFamily(caching.folder)
    packed = caching.run(family, settings={"text_dtype": dtype})
    assert family.counts == (0, 5, 5)
    assert packed.data.folders.latents == plain.data.folders.latents
    assert not {*packed.data.folders.texts.values()} & {*plain.data.folders.texts.values()}
    caption = packed.tables[0][0].caption()
    exact, rounded = plain.data.text(caption), packed.data.text(caption)
    assert exact.keys() == rounded.keys()
    assert rounded["clip_l.sequence"].dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert torch.allclose(exact["clip_l.sequence"], rounded["clip_l.sequence"].float(), rtol=2**-4)
    assert packed.data.length("clip_l", caption) == plain.data.length("clip_l", caption)
    assert caching.encode() == (0, 0, 0), "the earlier entries have been kept"


def test_keys_and_folder_names_never_change(caching: CachingSetup) -> None:
    """A change would encode every existing cache again."""

    def digest(*parts: str) -> bytes:
        joined = b"".join(b"%d:%s" % (len(part), part.encode()) for part in parts)
        return hashlib.blake2b(joined, digest_size=16).digest()

    cached = caching.run(FakeFamily(caching.folder), **caching.flipped())
    for example in cached.tables[0]:
        content = hashlib.blake2b(example.image.read(), digest_size=16).hexdigest()
        expected = digest(content, example.box.key(), "pixels 1")
        assert latents_key(example.image_hash, example.box.key()) == expected
    weights = hashlib.blake2b(b"weights", digest_size=16).hexdigest()
    identity = digest("vae", "mean", "version=1", f"weights.safetensors:{weights}").hex()
    assert cached.data.folders.latents == caching.folder / "cache" / f"vae-{identity[:16]}"
    settings = ("dtype=float32", "num_tokens=8", f"weights.safetensors:{weights}")
    assert cached.data.folders.texts["clip_l"].name == f"clip_l-{digest('clip_l', 'None', *settings).hex()[:16]}"
    posterior = caching.run(FakeFamily(caching.folder), settings={"posterior": True})
    assert posterior.data.folders.latents.name == "vae-8091e3242371660f"
    assert latents_key(bytes(16), "64x48+16+8:32x32", flipped=True).hex() == "2648261741fc3d64eb0d4ab62b9db449"
    assert content_key(STORED_STD, POSTERIOR_MOMENTS, FLIPPED_SUFFIX).hex() == "e950bb5a7c9ae420c8fb192be963d340"


# --- disk space --------------------------------------------------------------------------------------------------------


class FullSize(FakeFamily):
    """Encoders with outputs of realistic sizes."""

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
def test_the_planned_size_is_the_written_size(caching: CachingSetup, settings: dict[str, Any]) -> None:
    family, chosen = FullSize(caching.folder), replace(caching.settings, **settings)
    cached = caching.run(family, settings=settings, resolutions=[256], **caching.flipped())
    elsewhere = replace(chosen, folder=caching.folder / "elsewhere")
    any_family: Any = family
    plan = make_plan(any_family, cached.tables, [""], elsewhere)
    assert [len(work.items) for work in plan.all_work().values()] == [8, 0, 5, 5]
    written = sum(path.stat().st_size for path in chosen.folder.glob("*/*/*.safetensors"))
    assert plan.num_bytes == pytest.approx(written, rel=0.02)
    without_texts = make_plan(any_family, cached.tables, [], elsewhere)
    assert max_cache_bytes(any_family, cached.tables, chosen) == pytest.approx(without_texts.num_bytes, rel=0.02)


def test_a_full_disk_is_reported_before_anything_is_encoded(caching: CachingSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    family = FakeFamily(caching.folder)
    with pytest.raises(CachingError, match="has 0.0 MB of free disk space and caching takes .* set another cache_dir"):
        caching.run(family)
    assert (family.counts, family.num_loads) == ((0, 0, 0), 0)
    usage.free = 10**9
    assert caching.encode() == (4, 5, 5)
    usage.free = 0
    assert caching.encode() == (0, 0, 0), "nothing is missing"


def test_an_empty_table_loads_no_encoder(caching: CachingSetup) -> None:
    family = FakeFamily(caching.folder)
    cached = cache_alone(family, [empty_table()], [], caching.settings)
    assert (len(cached.tables[0]), family.num_loads, cached.encoded_any) == (0, 0, False)
