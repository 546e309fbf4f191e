"""The contract between a model family and the trainer.

The trainer knows latents, encoders and a flat list of layers, and nothing about any one network. A family
(one folder beside this file) gives it a `ModelFamily`; everything the trainer ever asks of a model is on this page.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.streams import Sample, SampleShape, StreamSpec

EncodedItem = dict[str, Tensor]
EncodeFunction = Callable[[Sequence[Any]], list[EncodedItem]]
DecodeFunction = Callable[[Tensor], Tensor]


class ModelFilesError(ValueError):
    """The files of a model are missing or do not fit; `errors` holds (key of the [model] table, what is wrong)."""

    def __init__(self, errors: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in errors))
        self.errors = list(errors)


@dataclass(frozen=True)
class LatentSpec:
    """Geometry of the latents a family trains on."""

    channels: int
    downscale: int
    """Pixels per latent pixel, per side."""
    patch: int
    """Latent pixels per token, per side."""
    max_side_pixels: int
    """Longest width or height the network can place."""

    @property
    def pixel_multiple(self) -> int:
        """Width and height of every training image must be a multiple of this (pixels)."""
        return self.downscale * self.patch


LENGTH = "length"
"""In a text encoder's items: (2,) int32, the tokens a caption would take if it were not cut, and how many characters of it
are read."""


class FrozenEncoder(ABC):
    """A network that turns images or captions into cached tensors and is never trained.

    `name` is unique in a family. `files` are the weights and tokenizer files, and `settings` everything else the output
    depends on (precision, token length, class); together they are the encoder's identity in the cache.
    """

    name: str
    files: tuple[Path, ...]
    settings: Mapping[str, str | int | float]

    @abstractmethod
    def load(self, device: torch.device) -> EncodeFunction:
        """Read the weights and return the function that encodes a list of inputs; dropping it frees the weights.

        An image encoder takes uint8 tensors (3, height, width) of one size; a text encoder takes strings. One dict of
        tensors comes back for each input, on the encoder's device. It does not depend on what else was in the list.
        """


class ImageEncoder(FrozenEncoder):
    """Images -> {"latents": (C, H, W), "deviation": (C, H, W)}, float32: mean and standard deviation of the posterior, as
    the network is trained on them."""


class TextEncoder(FrozenEncoder):
    """Captions -> tensors of these shapes and this dtype, and LENGTH."""

    num_tokens: int
    """Tokens a caption takes; a longer one is cut, a shorter one padded."""
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype


class BlockLayer(nn.Module):
    """A layer that can be left out: while `skipped`, it returns what it is given. For guidance, never in training."""

    skipped: bool = False


@dataclass(frozen=True)
class PipelineLayer:
    """One indivisible step of the network, as the pipeline sees it."""

    name: str
    """For people: in tables and messages."""
    prefix: str
    """What turns a parameter name of this layer into the family's native name ("joint_blocks.3.")."""
    cost: float
    """Relative compute cost; only ratios between layers matter."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each parameter, by its name within the layer."""
    build: Callable[[], nn.Module]
    """Builds the layer on the CPU with this layer's weights, reading no other layer's."""
    outputs: tuple[StreamSpec, ...] = ()
    """The streams the layer returns; none for the last layer, which returns one tensor."""
    block: int | None = None
    """Its number among the repeated blocks, if it is one; `build` then gives a BlockLayer."""

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class ModuleAdapter:
    """What an adapter holds for one module whose weight is W (out, in) or, of a convolution, (out, in, k, k).

    Low rank: `down` (rank, in) and `up` (out, rank), of a convolution (rank, in, k, k) and (out, rank, 1, 1); the update is
    scale * up @ down. With `magnitude` (out,) too (DoRA), each row of W + update is brought to that length.
    Kronecker (LoKr): the update is scale * kron(w1, w2); either factor may be a product, `w1_a` @ `w1_b`.
    """

    tensors: Mapping[str, Tensor]
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """A public adapter file, its headers read: which modules of the network it is for, and one module at a time."""

    path: Path
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Native module name -> tensor name of ModuleAdapter -> shape."""
    read: Callable[[str], ModuleAdapter]
    """The adapter of one of these modules, in float32."""
    left_out: tuple[str, ...]
    """Keys for other networks, such as text encoders."""


@dataclass(frozen=True)
class ExportNames:
    """File and folder names of exports of the whole network."""

    network_file: str
    """The network alone, with native keys."""
    complete_file: str
    """The network with the frozen encoders and decoder in one file."""
    diffusers_folder: str
    diffusers_stem: str
    """Beginning of the shards' and the index's file names in the diffusers folder."""


class ModelFamily(ABC):
    """A model family, ready to be encoded with, cut into stages, trained and exported."""

    export_names: ExportNames
    latent: LatentSpec
    layer_list_version: int
    """Changes with what `layers` means: training checkpoints name layers by their place in it."""
    network_files: tuple[Path, ...]
    """The files the layers are read from, adapters merged into them included."""
    network_settings: Mapping[str, Any]
    """What else the network's weights before training depend on."""
    image_encoder: ImageEncoder
    text_encoders: tuple[TextEncoder, ...]
    layers: tuple[PipelineLayer, ...]
    input_names: tuple[str, ...]
    """Names of the tensors the first layer takes."""
    adaptable_modules: Mapping[str, tuple[int, ...]]
    """Native name of every module that an adapter can be put on -> shape of its weight."""
    lora_target_groups: Mapping[str, str]
    """Names for sets of modules, for people: name -> regular expression over whole native names."""
    default_lora_targets: tuple[str, ...]
    """Of these groups, those trained when nothing is said."""
    num_blocks: int
    native_prefix: str
    """What stands before native names in a single file that holds more than the network."""
    sources: Mapping[str, Path]
    """What is read from which file or folder, by the names of the [model] table."""
    notes: tuple[str, ...]
    """What a user should be told of the files before the run."""

    @abstractmethod
    def block_of(self, module: str) -> int | None:
        """The number of the repeated block a module (native name) is in; None outside of them."""

    @abstractmethod
    def open_lora_file(self, path: Path) -> LoraFile:
        """An adapter for this network in any public format. Raises ModelFilesError, its key empty, when it is none."""

    @abstractmethod
    def describe(self) -> str:
        """The variant and its size in one line, for the start banner."""

    @abstractmethod
    def sample_shape(self, batch: int, height: int, width: int) -> SampleShape:
        """The shape of what `sample` returns for `batch` latents of these sizes in latent pixels."""

    @abstractmethod
    def sample(self, noisy_latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> Sample:
        """The inputs of the first layer for one micro-batch.

        noisy_latents (B, C, H, W) in the training dtype, sigma (B,) float32 in [0, 1], text: cached tensors stacked over
        the batch, keyed "encoder.tensor".
        """

    @staticmethod
    @abstractmethod
    def shift_at(shift: float, base_pixels: int, num_pixels: int) -> float:
        """The timestep shift of an image of `num_pixels`, where `shift` is that of an image of `base_pixels`."""

    @abstractmethod
    def velocity(self, output: Tensor, shape: SampleShape) -> Tensor:
        """The last layer's output as a velocity (B, C, H, W)."""

    @abstractmethod
    def load_decoder(self, device: torch.device, tile_pixels: int) -> DecodeFunction:
        """Read the image decoder; the function returned maps latents (B, C, H, W) to uint8 pixels (B, 3, h, w).

        Images with a side longer than `tile_pixels`, a multiple of 4 * downscale, are decoded in tiles of it that
        overlap by a quarter: slightly other pixels, for the memory of one tile.
        """

    @abstractmethod
    def native_adapter(self, modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
        """Adapters of some modules (native names) under the keys native tools read."""

    @abstractmethod
    def diffusers_adapter(self, modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
        """Low-rank adapters of some modules (native names) under diffusers' keys, their scale multiplied in."""

    @abstractmethod
    def diffusers_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole modules of the network under native names -> diffusers' names; copies nothing it need not."""

    @abstractmethod
    def diffusers_config(self) -> dict[str, Any]:
        """config.json of the network in diffusers' layout."""

    @abstractmethod
    def frozen_tensors(self) -> list[FileTensor]:
        """Autoencoder and text encoders as a complete single file has them beside the network.

        Raises ModelFilesError when such a file could not say how they are built.
        """

    @abstractmethod
    def export_metadata(self) -> dict[str, str]:
        """Standard safetensors header entries that name the architecture."""

    @abstractmethod
    def adapter_metadata(self, is_plain_lora: bool) -> dict[str, str]:
        """Returns the header entries of a native adapter file that name the program module which reads it.

        is_plain_lora: True for LoRA, False for DoRA and LoKr.
        """


@dataclass(frozen=True)
class FileTensor:
    """A tensor to be written into a public file: read when its turn comes."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[torch.dtype], Tensor]
    """The tensor on the CPU, rounded to a dtype once."""
    dtype: torch.dtype | None = None
    """What it must be stored in; None: as the rest of the file."""
