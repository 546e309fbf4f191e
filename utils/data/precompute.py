"""The caching pass: run each frozen encoder over what its store lacks, shared out among the ranks.

Rank 0 hashes files and decides what is missing; everyone works through one queue, one encoder in memory at a time, and
none at all when nothing is missing. A file that cannot be read is written down and skipped by whoever meets it, so no
rank ever waits for one that failed on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.base import EncodedItem, EncodeFunction, FrozenEncoder, ModelAdapter
from utils import distributed
from utils.data.cache import FileHashes, ShardWriter, Store, content_key
from utils.data.dataset import Example
from utils.data.images import PIXELS_VERSION, BadFile, read_mask, read_pixels
from utils.data.masks import MaskEncoder
from utils.log import bar_seconds


@dataclass(frozen=True)
class EncoderPlan:
    """Where one encoder's tensors are, and which it still lacks."""

    folder: Path
    keys: dict[str, str]
    """What is encoded (an example's key, that of its mirrored variant, a caption) -> its key in the store."""
    missing: list[str]
    """Of these, one for each store key that is not there yet, in order."""


@dataclass(frozen=True)
class CachePlan:
    """Rank 0's decision, the same on every rank."""

    images: EncoderPlan
    masks: EncoderPlan
    texts: dict[str, EncoderPlan]
    bad_files: list[BadFile] = field(default_factory=list)


@dataclass(frozen=True)
class EncoderInputs:
    """How what is to be encoded is read, and which files cannot be used if it cannot."""

    read: Callable[[str], Tensor | str]
    blame: Callable[[str, str], list[BadFile]]
    """(What, reason) -> the pictures that cannot be used, each with the reason in its own words."""


class EncodedData:
    """The cache as training reads it: an example's latents and mask, a caption's text tensors."""

    def __init__(self, plan: CachePlan) -> None:
        self._plan = plan
        self._latents = Store(plan.images.folder)
        self._masks = Store(plan.masks.folder)
        self._texts = {name: Store(text.folder) for name, text in plan.texts.items()}

    def content_keys(self, example: Example) -> list[str]:
        """What the example's tensors depend on, as names: of picture, mask and caption, each with its encoder's."""
        found = [(self._plan.images, example.key)]
        found += [(self._plan.masks, example.key)] if example.mask is not None else []
        found += [(plan, example.caption) for plan in self._plan.texts.values()]
        return [f"{plan.folder.name}/{plan.keys[what]}" for plan, what in found]

    def latents(self, example: Example, *, flipped: bool = False) -> Tensor:
        """(C, H, W) float32; flipped: of the mirrored picture, which only an example that may be flipped has."""
        what = _mirrored(example.key) if flipped else example.key
        return self._latents.get(self._plan.images.keys[what])["latents"]

    def mask(self, example: Example, *, flipped: bool = False) -> Tensor | None:
        """How much each latent pixel counts: (1, H, W) float32 in [0, 1]; None for an example without mask."""
        if example.mask is None:
            return None
        mask = self._masks.get(self._plan.masks.keys[example.key])["mask"]
        return mask.flip(-1) if flipped else mask

    def text(self, caption: str) -> dict[str, Tensor]:
        """ "encoder.tensor" -> tensor, without a batch axis."""
        tensors = {}
        for name, store in self._texts.items():
            entry = store.get(self._plan.texts[name].keys[caption])
            tensors.update({f"{name}.{key}": value for key, value in entry.items()})
        return tensors


def cache_dataset(
    adapter: ModelAdapter, examples: Sequence[Example], captions: Sequence[str], cache_folder: Path, device: torch.device
) -> tuple[EncodedData, list[BadFile]]:
    """Encode what the cache lacks. All ranks; returns on all of them the cache and the files that could not be encoded."""
    decided = make_plan(adapter, examples, captions, cache_folder) if distributed.world().is_main else None
    distributed.wait_for_all("cache planned")  # reading a large dataset may outlast a collective's time limit
    plan = distributed.broadcast(decided)
    assert plan is not None
    bad_files = plan.bad_files + encode_missing(adapter, plan, examples, device)
    return EncodedData(plan), bad_files


# --- deciding ----------------------------------------------------------------------------------------------------------


def make_plan(adapter: ModelAdapter, examples: Sequence[Example], captions: Sequence[str], cache_folder: Path) -> CachePlan:
    """What is cached where and what is missing. Rank 0 only: it reads every file it has not hashed before."""
    hashes = FileHashes(cache_folder / "files.json")
    image_keys: dict[str, str] = {}
    mask_keys: dict[str, str] = {}
    bad_files: dict[tuple[Path, str], BadFile] = {}
    for example in tqdm(examples, desc="reading files", unit="image", leave=False, delay=2.0):
        try:
            masks = _mask_keys(example, hashes)
            image_keys.update(_image_keys(example, hashes))
            mask_keys.update(masks)
        except BadFile as bad:
            bad_files[bad.path, bad.reason] = bad  # once, however many sizes the picture has

    def plan(encoder: FrozenEncoder, keys: dict[str, str]) -> EncoderPlan:
        return _plan_encoder(cache_folder, encoder.name, _identity(encoder, hashes), keys)

    images = plan(adapter.image_encoder, image_keys)
    masks_plan = plan(MaskEncoder(adapter.latent.downscale), mask_keys)
    texts = {
        encoder.name: plan(encoder, {text: content_key(text) for text in captions}) for encoder in adapter.text_encoders
    }
    hashes.save()
    return CachePlan(images, masks_plan, texts, list(bad_files.values()))


def _mirrored(key: str) -> str:
    """Names the mirrored variant of an example or of a geometry."""
    return f"{key} mirrored"


def _image_keys(example: Example, hashes: FileHashes) -> dict[str, str]:
    """The example and, if it may be flipped, its mirrored variant -> store key. Raises BadFile."""
    try:
        content = hashes.hash_of(example.image)
    except OSError as error:
        raise BadFile(example.image, f"cannot be read: {error.strerror}") from error
    geometry, version = example.box.key(), f"pixels {PIXELS_VERSION}"
    keys = {example.key: content_key(content, geometry, version)}
    if example.may_flip:
        keys[_mirrored(example.key)] = content_key(content, _mirrored(geometry), version)
    return keys


def _mask_keys(example: Example, hashes: FileHashes) -> dict[str, str]:
    """The example -> store key of its mask, if it has one. Raises BadFile."""
    if example.mask is None:
        return {}
    try:
        content = hashes.hash_of(example.mask)
    except OSError as error:
        raise _bad_mask(example, f"cannot be read: {error.strerror}") from error
    return {example.key: content_key(content, example.box.key())}


def _bad_mask(example: Example, reason: str) -> BadFile:
    """It is the picture that cannot be used."""
    return BadFile(example.image, f"its mask {example.mask} {reason}")


def _identity(encoder: FrozenEncoder, hashes: FileHashes) -> str:
    """Everything an encoder's output depends on, as one name."""
    settings = [f"{key}={value}" for key, value in sorted(encoder.settings.items())]
    return content_key(encoder.name, *settings, *(f"{path.name}:{hashes.hash_of(path)}" for path in encoder.files))


def _plan_encoder(cache_folder: Path, name: str, identity: str, keys: dict[str, str]) -> EncoderPlan:
    folder = cache_folder / f"{name}-{identity[:16]}"
    store = Store(folder)
    first_of: dict[str, str] = {}
    for what, key in keys.items():
        if key not in store:
            first_of.setdefault(key, what)
    return EncoderPlan(folder, keys, list(first_of.values()))


# --- encoding ----------------------------------------------------------------------------------------------------------


def encode_missing(
    adapter: ModelAdapter, plan: CachePlan, examples: Sequence[Example], device: torch.device
) -> list[BadFile]:
    """Encode everything the plan misses. All ranks; returns on all of them the files that could not be encoded."""
    bad_files: list[BadFile] = []
    _run_encoder(adapter.image_encoder, plan.images, _image_inputs(plan.images, examples), device, bad_files)
    masks = MaskEncoder(adapter.latent.downscale)
    _run_encoder(masks, plan.masks, _mask_inputs(plan.masks, examples, adapter.latent.downscale), device, bad_files)
    captions = EncoderInputs(
        read=lambda text: text,
        blame=lambda text, reason: [BadFile(e.image, reason) for e in examples if e.caption == text],
    )
    for encoder in adapter.text_encoders:
        _run_encoder(encoder, plan.texts[encoder.name], captions, device, bad_files)
    everyones = [bad for found in distributed.gather([(b.path, b.reason) for b in bad_files]) for bad in found]
    return [BadFile(path, reason) for path, reason in sorted(set(everyones))]


def _image_inputs(plan: EncoderPlan, examples: Sequence[Example]) -> EncoderInputs:
    variants = {example.key: (example, False) for example in examples}
    variants |= {_mirrored(example.key): (example, True) for example in examples if example.may_flip}

    def read(what: str) -> Tensor:
        example, mirrored = variants[what]
        return read_pixels(example.image, example.box, mirrored=mirrored)

    def blame(what: str, reason: str) -> list[BadFile]:
        users = [example for other, (example, _) in variants.items() if plan.keys.get(other) == plan.keys[what]]
        return [BadFile(example.image, reason) for example in users]

    return EncoderInputs(read, blame)


def _mask_inputs(plan: EncoderPlan, examples: Sequence[Example], downscale: int) -> EncoderInputs:
    masked = {example.key: (example, example.mask) for example in examples if example.mask is not None}

    def read(what: str) -> Tensor:
        example, mask = masked[what]
        return read_mask(mask, example.box, downscale)

    def blame(what: str, reason: str) -> list[BadFile]:
        users = [example for example, _ in masked.values() if plan.keys.get(example.key) == plan.keys[what]]
        return [_bad_mask(example, reason) for example in users]

    return EncoderInputs(read, blame)


def _run_encoder(
    encoder: FrozenEncoder, plan: EncoderPlan, inputs: EncoderInputs, device: torch.device, bad_files: list[BadFile]
) -> None:
    if not plan.missing:
        return
    here = distributed.world()
    encode: EncodeFunction | None = None
    writer = ShardWriter(plan.folder)
    queue = distributed.WorkQueue(f"encode {encoder.name}", len(plan.missing))
    title = f"caching {encoder.name}"
    with tqdm(total=len(plan.missing), desc=title, disable=not here.is_main, mininterval=bar_seconds()) as bar:
        for index in queue:
            what = plan.missing[index]
            if encode is None:  # not before: a rank that gets no work need not hold the encoder
                encode = encoder.load(device)
            try:
                tensors = encode([inputs.read(what)])[0]
                reason = None if _all_finite(tensors) else f"{encoder.name} made numbers of it that are not finite"
            except BadFile as bad:
                reason = bad.reason
            if reason is None:
                writer.add(plan.keys[what], tensors)
            else:
                bad_files += _blame(inputs, what, reason)
            if here.is_main:
                bar.update(queue.num_taken() - bar.n)
        writer.flush()
        distributed.wait_for_all(f"encoded {encoder.name}")
        bar.update(len(plan.missing) - bar.n)
    del encode
    distributed.free_memory()


def _all_finite(tensors: EncodedItem) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _blame(inputs: EncoderInputs, what: str, reason: str) -> list[BadFile]:
    """Every file that cannot be used because of this. A prompt has none to leave out: raises FloatingPointError."""
    files = inputs.blame(what, reason)
    if not files:
        raise FloatingPointError(f"{what!r}: {reason}")
    return files
