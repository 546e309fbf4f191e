"""The caching pass: what is encoded, what is not encoded again, and what happens to bad files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.base import EncodedItem, EncodeFunction, FrozenEncoder
from tests.tiny_model import make_tiny_dataset, write_picture
from tests.utils.data.pictures import noise, save
from utils.config.schema import DatasetConfig
from utils.data.cache import ShardWriter
from utils.data.dataset import Dataset, Example, scan
from utils.data.images import BadFile
from utils.data.precompute import EncodedData, cache_dataset

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
