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
from utils.data.images import PIXELS_VERSION, BadFile, read_pixels
from utils.log import bar_seconds


@dataclass(frozen=True)
class EncoderPlan:
    """Where one encoder's tensors are, and which it still lacks."""

    folder: Path
    keys: dict[str, str]
    """What is encoded (an example's key, a caption) -> its key in the store."""
    missing: list[str]
    """Of these, one for each store key that is not there yet, in order."""


@dataclass(frozen=True)
class CachePlan:
    """Rank 0's decision, the same on every rank."""

    images: EncoderPlan
    texts: dict[str, EncoderPlan]
    bad_files: list[BadFile] = field(default_factory=list)


@dataclass(frozen=True)
class EncoderInputs:
    """How what is to be encoded (an example's key, a caption) is read, and which files cannot be used if it cannot."""

    read: Callable[[str], Tensor | str]
    files: Callable[[str], list[Path]]


class EncodedData:
    """The cache as training reads it: an example's latents, a caption's text tensors."""

    def __init__(self, plan: CachePlan) -> None:
        self._plan = plan
        self._latents = Store(plan.images.folder)
        self._texts = {name: Store(text.folder) for name, text in plan.texts.items()}

    def latents(self, example: Example) -> Tensor:
        """(C, H, W) float32."""
        return self._latents.get(self._plan.images.keys[example.key])["latents"]

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
    bad_files: list[BadFile] = []
    image_identity = _identity(adapter.image_encoder, hashes)
    image_keys: dict[str, str] = {}
    for example in tqdm(examples, desc="reading files", unit="image", leave=False, delay=2.0):
        try:
            content = hashes.hash_of(example.image)
        except OSError as error:
            bad_files.append(BadFile(example.image, f"cannot be read: {error.strerror}"))
            continue
        image_keys[example.key] = content_key(content, example.box.key(), f"pixels {PIXELS_VERSION}")
    texts = {
        encoder.name: _plan_encoder(
            cache_folder, encoder.name, _identity(encoder, hashes), {text: content_key(text) for text in captions}
        )
        for encoder in adapter.text_encoders
    }
    hashes.save()
    return CachePlan(_plan_encoder(cache_folder, adapter.image_encoder.name, image_identity, image_keys), texts, bad_files)


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
    by_key = {example.key: example for example in examples}
    bad_files: list[BadFile] = []
    content = plan.images.keys
    pictures = EncoderInputs(
        read=lambda key: read_pixels(by_key[key].image, by_key[key].box),
        files=lambda key: [e.image for e in examples if content.get(e.key) == content[key]],
    )
    captions = EncoderInputs(read=lambda text: text, files=lambda text: [e.image for e in examples if e.caption == text])
    _run_encoder(adapter.image_encoder, plan.images, pictures, device, bad_files)
    for encoder in adapter.text_encoders:
        _run_encoder(encoder, plan.texts[encoder.name], captions, device, bad_files)
    everyones = [bad for found in distributed.gather([(b.path, b.reason) for b in bad_files]) for bad in found]
    return [BadFile(path, reason) for path, reason in sorted(set(everyones))]


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
                bad_files += _blame(inputs.files(what), what, reason)
            if here.is_main:
                bar.update(queue.num_taken() - bar.n)
        writer.flush()
        distributed.wait_for_all(f"encoded {encoder.name}")
        bar.update(len(plan.missing) - bar.n)
    del encode
    distributed.free_memory()


def _all_finite(tensors: EncodedItem) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _blame(files: Sequence[Path], what: str, reason: str) -> list[BadFile]:
    """Every file that cannot be used because of this. A prompt has none to leave out: raises FloatingPointError."""
    if not files:
        raise FloatingPointError(f"{what!r}: {reason}")
    return [BadFile(path, reason) for path in files]
