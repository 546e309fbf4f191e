"""The caching pass: what is encoded, what is not encoded again, and what happens to bad files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from models.base import EncodedItem, EncodeFunction, FrozenEncoder, LatentSpec
from tests.tiny_model import make_tiny_dataset, write_picture
from tests.utils.data.pictures import left_half, noise, save
from utils.config.schema import DatasetConfig
from utils.data.cache import FileHashes, ShardWriter, Store, content_key
from utils.data.dataset import Dataset, Example, scan
from utils.data.images import BadFile, read_mask, read_pixels, read_size
from utils.data.precompute import EncodedData, cache_dataset, make_plan

CPU = torch.device("cpu")


def cache_alone(*arguments: Any) -> tuple[EncodedData, list[BadFile]]:
    """cache_dataset in a process group of one, a new one each time, as in a run without launcher."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return cache_dataset(*arguments)
    finally:
        dist.destroy_process_group()


class CountingEncoder(FrozenEncoder):
    """Encodes anything to a tensor of its own, and counts."""

    def __init__(self, name: str, files: tuple[Path, ...], num_tokens: int = 8, dtype: str = "float32") -> None:
        self.name, self.files = name, files
        self.settings = {"num_tokens": num_tokens, "dtype": dtype}
        self.encoded: list[Any] = []
        self.num_loads = 0
        self.poison: Any = None

    def load(self, device: torch.device) -> EncodeFunction:
        self.num_loads += 1

        def encode(items: Sequence[Any]) -> list[EncodedItem]:
            self.encoded += items
            return [self.value(item) for item in items]

        return encode

    def value(self, item: Any) -> EncodedItem:
        if isinstance(item, Tensor):
            return {"latents": item.float().mean((1, 2))}
        tokens = [float(ord(letter)) for letter in item[:4]]
        return {"sequence": torch.tensor(tokens) if item != self.poison else torch.tensor([float("nan")])}


class Adapter:
    """As much of a model family as the caching pass asks for."""

    latent = LatentSpec(channels=16, downscale=8, patch=2, max_side_pixels=256)

    def __init__(self, folder: Path, **settings: Any) -> None:
        weights = folder / "weights.safetensors"
        if not weights.exists():
            weights.write_bytes(b"weights")
        self.image_encoder = CountingEncoder("vae", (weights,))
        self.clip = CountingEncoder("clip_l", (weights,), **settings)
        self.t5 = CountingEncoder("t5xxl", (weights,))
        self.text_encoders = (self.clip, self.t5)

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.image_encoder.encoded), len(self.clip.encoded), len(self.t5.encoded)


class Workshop:
    """A folder with pictures and a cache, gone over by one adapter after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = make_tiny_dataset(folder / "pictures", 4)

    def scan(self, **changes: Any) -> Dataset:
        return scan(DatasetConfig(**{"resolutions": [32], "directory": [{"path": self.pictures}], **changes}), 16)

    def examples(self, **changes: Any) -> list[Example]:
        return self.scan(**changes).examples

    def run(self, adapter: Adapter, **changes: Any) -> tuple[EncodedData, list[BadFile]]:
        examples = self.examples(**changes)
        captions = sorted({"", *(example.caption for example in examples)})
        return cache_alone(adapter, examples, captions, self.folder / "cache", CPU)

    def encode(self, **settings: Any) -> tuple[int, int, int]:
        """How many pictures and captions a fresh adapter had to encode."""
        adapter = Adapter(self.folder, **settings)
        self.run(adapter)
        return adapter.counts


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_everything_is_encoded_once_and_read_back(workshop: Workshop) -> None:
    adapter = Adapter(workshop.folder)
    data, bad = workshop.run(adapter)
    assert bad == []
    assert adapter.counts == (4, 5, 5)
    examples = workshop.examples()
    for example, picture in zip(examples, adapter.image_encoder.encoded, strict=True):
        assert picture.shape == (3, example.bucket.height, example.bucket.width)
        assert torch.equal(data.latents(example), picture.float().mean((1, 2)))
        text = data.text(example.caption)
        assert set(text) == {"clip_l.sequence", "t5xxl.sequence"}
        assert torch.equal(text["clip_l.sequence"], adapter.clip.value(example.caption)["sequence"])
    assert data.text("")["t5xxl.sequence"].shape == (0,)


def test_a_full_cache_loads_no_encoder(workshop: Workshop) -> None:
    workshop.encode()
    adapter = Adapter(workshop.folder)
    data, _ = workshop.run(adapter)
    assert adapter.counts == (0, 0, 0)
    assert adapter.image_encoder.num_loads == adapter.clip.num_loads == adapter.t5.num_loads == 0
    assert data.latents(workshop.examples()[0]).shape == (3,)


def test_editing_a_caption_encodes_one_caption_and_no_pixel(workshop: Workshop) -> None:
    workshop.encode()
    (workshop.pictures / "picture_002.txt").write_text("another caption")
    adapter = Adapter(workshop.folder)
    data, _ = workshop.run(adapter)
    assert adapter.counts == (0, 1, 1)
    assert adapter.clip.encoded == ["another caption"]
    assert data.text("another caption")


def test_adding_a_picture_encodes_one_picture(workshop: Workshop) -> None:
    workshop.encode()
    write_picture(workshop.pictures, 9)
    assert workshop.encode() == (1, 1, 1)


def test_removing_a_picture_encodes_nothing(workshop: Workshop) -> None:
    workshop.encode()
    (workshop.pictures / "picture_000.png").unlink()
    assert workshop.encode() == (0, 0, 0)


def test_a_picture_replaced_in_place_is_encoded_again_and_read_anew(workshop: Workshop) -> None:
    before, _ = workshop.run(Adapter(workshop.folder))
    example = workshop.examples()[0]
    old = before.latents(example)
    replacement = write_picture(workshop.folder, 3)
    replacement.replace(workshop.pictures / "picture_000.png")
    adapter = Adapter(workshop.folder)
    after, _ = workshop.run(adapter)
    assert len(adapter.image_encoder.encoded) == 0, "it is byte for byte another picture that is there already"
    (workshop.pictures / "picture_000.png").write_bytes(write_picture(workshop.folder, 27).read_bytes())
    adapter = Adapter(workshop.folder)
    after, _ = workshop.run(adapter)
    assert len(adapter.image_encoder.encoded) == 1
    assert not torch.equal(after.latents(workshop.examples()[0]), old)


def test_a_renamed_picture_is_not_encoded_again(workshop: Workshop) -> None:
    workshop.encode()
    for suffix in (".png", ".txt"):
        (workshop.pictures / f"picture_001{suffix}").rename(workshop.pictures / f"renamed{suffix}")
    assert workshop.encode() == (0, 0, 0)


def test_another_geometry_encodes_pictures_and_no_captions(workshop: Workshop) -> None:
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


def test_equal_captions_and_equal_pictures_are_encoded_once(workshop: Workshop) -> None:
    for index in range(4):
        (workshop.pictures / f"picture_{index:03d}.txt").write_text("all the same")
    copy = workshop.pictures / "copy.png"
    copy.write_bytes((workshop.pictures / "picture_000.png").read_bytes())
    copy.with_suffix(".txt").write_text("all the same")
    adapter = Adapter(workshop.folder)
    data, _ = workshop.run(adapter)
    assert adapter.counts == (4, 2, 2)
    assert len({tuple(data.latents(example).tolist()) for example in workshop.examples()}) == 4


def test_a_picture_that_breaks_after_the_scan_is_named_and_stops_nobody(workshop: Workshop) -> None:
    examples = workshop.examples()
    broken = workshop.pictures / "picture_001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    gone = workshop.pictures / "picture_002.png"
    gone.unlink()
    adapter = Adapter(workshop.folder)
    data, bad = cache_alone(adapter, examples, [""], workshop.folder / "cache", CPU)
    assert {entry.path for entry in bad} == {broken, gone}
    assert all(isinstance(entry, BadFile) and entry.reason for entry in bad)
    assert data.latents(examples[0]).shape == data.latents(examples[3]).shape == (3,)


def test_every_copy_of_a_picture_that_cannot_be_decoded_is_named(workshop: Workshop) -> None:
    """Copies share one entry of the cache; training must not ask for it under any of their names."""
    damaged = save(noise(), workshop.pictures / "picture_001.png")
    content = bytearray(damaged.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"\x00" * 64
    damaged.write_bytes(bytes(content))
    copy = workshop.pictures / "picture_001_copy.png"
    copy.write_bytes(bytes(content))
    copy.with_suffix(".txt").write_text("a copy")
    names = [(bad.path, bad.reason) for bad in workshop.scan().bad_files]
    _, bad = workshop.run(Adapter(workshop.folder))
    assert {path for path, _ in names} | {entry.path for entry in bad} == {damaged, copy}


def test_numbers_that_are_not_finite_are_never_cached(workshop: Workshop) -> None:
    example = workshop.examples()[1]
    adapter = Adapter(workshop.folder)
    adapter.clip.poison = example.caption
    data, bad = workshop.run(adapter)
    assert [entry.path for entry in bad] == [example.image]
    assert "not finite" in bad[0].reason
    assert "clip_l" in bad[0].reason
    with pytest.raises(KeyError):
        data.text(example.caption)
    adapter = Adapter(workshop.folder)
    _, bad = workshop.run(adapter)
    assert bad == []
    assert adapter.counts == (0, 1, 0)


def test_a_prompt_that_gives_no_finite_numbers_stops_the_run(workshop: Workshop) -> None:
    adapter = Adapter(workshop.folder)
    adapter.clip.poison = "a prompt of no picture"
    with pytest.raises(FloatingPointError, match="a prompt of no picture"):
        cache_alone(adapter, workshop.examples(), ["", "a prompt of no picture"], workshop.folder / "cache", CPU)


def test_an_encoder_that_fails_keeps_what_was_written_before(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted pass goes on where it stopped: shards of some entries stay."""

    class OneEach(ShardWriter):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder, max_bytes=1)

    monkeypatch.setattr("utils.data.precompute.ShardWriter", OneEach)
    adapter = Adapter(workshop.folder)
    real_value = adapter.image_encoder.value

    def fail_at_the_third(item: Any) -> EncodedItem:
        if len(adapter.image_encoder.encoded) == 3:
            raise KeyboardInterrupt
        return real_value(item)

    monkeypatch.setattr(adapter.image_encoder, "value", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        workshop.run(adapter)
    adapter = Adapter(workshop.folder)
    workshop.run(adapter)
    assert adapter.counts == (2, 5, 5)


def test_a_file_s_place_in_the_cache_stays_what_it_was(workshop: Workshop) -> None:
    """Else every cache there is would be encoded anew: the keys of pictures that are not mirrored, and their folder."""
    examples = workshop.examples(directory=[{"path": workshop.pictures, "horizontal_flip": True}])
    plan = make_plan(Adapter(workshop.folder), examples, [], workshop.folder / "cache")  # type: ignore[arg-type]
    hashes = FileHashes(workshop.folder / "cache" / "files.json")
    for example in examples:
        content = hashes.hash_of(example.image)
        assert plan.images.keys[example.key] == content_key(content, example.box.key(), "pixels 1")
    weights = hashes.hash_of(workshop.folder / "weights.safetensors")
    identity = content_key("vae", "dtype=float32", "num_tokens=8", f"weights.safetensors:{weights}")
    assert plan.images.folder == workshop.folder / "cache" / f"vae-{identity[:16]}"


# --- mirrored pictures -------------------------------------------------------------------------------------------------


class KeepsPixels(CountingEncoder):
    """Latents that are the picture."""

    def value(self, item: Any) -> EncodedItem:
        return {"latents": item.float()}


def with_flips(workshop: Workshop) -> dict[str, Any]:
    return {"directory": [{"path": workshop.pictures, "horizontal_flip": True}]}


def test_mirrored_latents_are_the_mirrored_picture_encoded(workshop: Workshop) -> None:
    """Not mirrored latents: an autoencoder does not make the one of the other."""
    adapter = Adapter(workshop.folder)
    adapter.image_encoder = KeepsPixels("vae", adapter.image_encoder.files)
    data, bad = workshop.run(adapter, **with_flips(workshop))
    assert bad == []
    assert adapter.counts == (8, 5, 5)
    for example in workshop.examples():
        plain, mirrored = data.latents(example), data.latents(example, flipped=True)
        assert torch.equal(plain, read_pixels(example.image, example.box).float())
        assert torch.equal(mirrored, plain.flip(-1))
    assert any(not torch.equal(data.latents(e), data.latents(e, flipped=True)) for e in workshop.examples())


def test_asking_for_flips_later_encodes_the_mirrored_pictures_only(workshop: Workshop) -> None:
    workshop.encode()
    adapter = Adapter(workshop.folder)
    workshop.run(adapter, **with_flips(workshop))
    assert adapter.counts == (4, 0, 0)
    assert workshop.encode() == (0, 0, 0)


def test_only_pictures_that_may_be_flipped_have_a_mirrored_variant(workshop: Workshop) -> None:
    data, _ = workshop.run(Adapter(workshop.folder))
    with pytest.raises(KeyError):
        data.latents(workshop.examples()[0], flipped=True)


def test_a_picture_in_training_and_evaluation_is_encoded_once(workshop: Workshop) -> None:
    """Only training shows it mirrored."""
    training = workshop.examples(**with_flips(workshop))
    evaluation = [replace(example, key=f"eval/{example.key}", may_flip=False) for example in training]
    adapter = Adapter(workshop.folder)
    data, bad = cache_alone(adapter, training + evaluation, [""], workshop.folder / "cache", CPU)
    assert (adapter.counts, bad) == ((8, 1, 1), [])
    assert torch.equal(data.latents(training[0]), data.latents(evaluation[0]))


def test_a_picture_that_breaks_in_both_variants_is_named_once(workshop: Workshop) -> None:
    examples = workshop.examples(resolutions=[32, 64], **with_flips(workshop))
    broken, gone = workshop.pictures / "picture_001.png", workshop.pictures / "picture_002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    gone.unlink()
    _, bad = cache_alone(Adapter(workshop.folder), examples, [""], workshop.folder / "cache", CPU)
    assert sorted(entry.path for entry in bad) == [broken, gone]


# --- masks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def masked(workshop: Workshop) -> dict[str, Any]:
    """The change of the workshop's dataset that gives each picture a mask."""
    masks = workshop.folder / "masks"
    masks.mkdir()
    for image in workshop.pictures.glob("*.png"):
        save(left_half(*read_size(image)), masks / image.name)
    return {"directory": [{"path": workshop.pictures, "mask_path": masks}]}


def num_cached_masks(workshop: Workshop) -> int:
    return sum(len(Store(folder)) for folder in (workshop.folder / "cache").glob("mask-*"))


def test_masks_are_read_back_at_the_size_of_latents(workshop: Workshop, masked: dict[str, Any]) -> None:
    data, bad = workshop.run(Adapter(workshop.folder), **masked)
    assert bad == []
    for example in workshop.examples(**masked):
        mask = data.mask(example)
        assert mask is not None
        assert mask.dtype == torch.float32
        assert mask.shape == (1, example.bucket.height // 8, example.bucket.width // 8)
        assert example.mask is not None
        assert torch.equal(mask, read_mask(example.mask, example.box, 8))
        flipped = data.mask(example, flipped=True)
        assert flipped is not None
        assert torch.equal(flipped, mask.flip(-1))
        assert not torch.equal(flipped, mask)


def test_adding_masks_encodes_no_picture_and_no_caption(workshop: Workshop, masked: dict[str, Any]) -> None:
    workshop.encode()
    adapter = Adapter(workshop.folder)
    workshop.run(adapter, **masked)
    assert adapter.counts == (0, 0, 0)
    assert num_cached_masks(workshop) == 4 - 1, "the first and the last picture have one shape, so equal masks"


def test_editing_a_mask_reads_one_mask_and_encodes_nothing(
    workshop: Workshop, masked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.run(Adapter(workshop.folder), **masked)
    edited = workshop.folder / "masks" / "picture_001.png"
    save(Image.new("L", read_size(edited), 100), edited)
    read: list[Path] = []

    def counting(path: Path, *arguments: Any) -> Tensor:
        read.append(path)
        return read_mask(path, *arguments)

    monkeypatch.setattr("utils.data.precompute.read_mask", counting)
    adapter = Adapter(workshop.folder)
    data, _ = workshop.run(adapter, **masked)
    assert read == [edited]
    assert adapter.counts == (0, 0, 0)
    mask = data.mask(workshop.examples(**masked)[1])
    assert mask is not None
    assert torch.equal(mask.unique(), torch.tensor([100 / 255]))


def test_editing_a_caption_of_a_masked_picture_encodes_one_caption(workshop: Workshop, masked: dict[str, Any]) -> None:
    flipped = {"directory": [{**masked["directory"][0], "horizontal_flip": True}]}
    workshop.run(Adapter(workshop.folder), **flipped)
    before = num_cached_masks(workshop)
    (workshop.pictures / "picture_002.txt").write_text("another caption")
    adapter = Adapter(workshop.folder)
    workshop.run(adapter, **flipped)
    assert adapter.counts == (0, 1, 1)
    assert num_cached_masks(workshop) == before


def test_without_masks_nothing_is_kept_of_any(workshop: Workshop) -> None:
    data, _ = workshop.run(Adapter(workshop.folder))
    assert data.mask(workshop.examples()[0]) is None
    assert data.mask(workshop.examples()[0], flipped=True) is None
    assert not list((workshop.folder / "cache").glob("mask-*"))


def test_another_downscale_is_another_mask(workshop: Workshop, masked: dict[str, Any]) -> None:
    workshop.run(Adapter(workshop.folder), **masked)
    adapter = Adapter(workshop.folder)
    adapter.latent = replace(adapter.latent, downscale=16)
    data, _ = workshop.run(adapter, **masked)
    example = workshop.examples(**masked)[0]
    mask = data.mask(example)
    assert mask is not None
    assert mask.shape == (1, example.bucket.height // 16, example.bucket.width // 16)


def test_the_pictures_of_bad_masks_are_named_and_stop_nobody(workshop: Workshop, masked: dict[str, Any]) -> None:
    """Equal masks share an entry; each picture is told with its own."""
    masks, pictures = workshop.folder / "masks", workshop.pictures
    for index in (0, 3):  # of one shape
        save(Image.new("L", read_size(masks / f"picture_00{index}.png"), 0), masks / f"picture_00{index}.png")
    examples = workshop.examples(**masked)
    gone = masks / "picture_001.png"
    gone.unlink()
    data, bad = cache_alone(Adapter(workshop.folder), examples, [""], workshop.folder / "cache", CPU)
    reasons = {entry.path.name: entry.reason for entry in bad}
    assert {entry.path.parent for entry in bad} == {pictures}
    black = "is black everywhere: nothing of the picture would count"
    assert reasons == {
        "picture_000.png": f"its mask {masks / 'picture_000.png'} {black}",
        "picture_001.png": f"its mask {gone} cannot be read: No such file or directory",
        "picture_003.png": f"its mask {masks / 'picture_003.png'} {black}",
    }
    assert data.mask(examples[2]) is not None


def test_masks_take_the_same_way_to_the_disk(
    workshop: Workshop, masked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one writer, which a kill cannot make leave half a shard: test_cache.py."""
    written: list[str] = []

    class Noting(ShardWriter):
        def add(self, key: str, tensors: Any) -> None:
            written.append(self.folder.name.partition("-")[0])
            super().add(key, tensors)

    monkeypatch.setattr("utils.data.precompute.ShardWriter", Noting)
    workshop.run(Adapter(workshop.folder), **masked)
    assert set(written) == {"vae", "mask", "clip_l", "t5xxl"}
    assert written.count("mask") == num_cached_masks(workshop)
