"""The interface between the trainer and a model family (other programs call it a model adapter).

The trainer works with latents, encoders and a flat list of pipeline layers; everything it asks of a model is declared here.
A family is a folder next to this file with a `ModelFamily`.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.streams import Sample, SampleShape, StreamSpec

EncodedItem = dict[str, Tensor]
EncodeFunction = Callable[[Sequence[Any]], list[EncodedItem]]
DecodeFunction = Callable[[Tensor], Tensor]
FileErrors = list[tuple[str, str]]
"""(key of the [model] table, message) of each error."""


class ModelFilesError(ValueError):
    """Files of a model are missing or invalid; `errors` has (key of the [model] table, message) of each error."""

    def __init__(self, errors: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in errors))
        self.errors = list(errors)


class NoFilesError(RuntimeError):
    """A family from `from_variant` was used for something that requires the model's files."""


@dataclass(frozen=True)
class LatentSpec:
    """Geometry of the latents a family trains on."""

    channels: int
    downscale: int
    """Pixels per latent pixel, per side."""
    patch: int
    """Latent pixels per token, per side."""
    max_side_pixels: int
    """Largest width or height that the network has position embeddings for."""

    @property
    def pixel_multiple(self) -> int:
        """Width and height of every training image must be a multiple of this (pixels)."""
        return self.downscale * self.patch


# --- encoders ----------------------------------------------------------------------------------------------------------

LENGTH = "length"
"""Key in a text encoder's items: (2,) int32, the caption's tokens before truncation and the number of its characters that
the encoder reads."""


class FrozenEncoder(ABC):
    """A network that encodes images or captions into cached tensors and is never trained.

    `name` is unique in a family. `files` are the weights and tokenizer files, `settings` everything else that the output
    depends on (precision, token length, class); both together identify the encoder in the cache.
    """

    name: str
    files: tuple[Path, ...]
    settings: Mapping[str, str | int | float]

    @abstractmethod
    def load(self, device: torch.device) -> EncodeFunction:
        """Reads the weights and returns a function that encodes a list of inputs; deleting the function frees the weights.

        An image encoder takes uint8 tensors (3, height, width) of one size; a text encoder takes strings. The function
        returns one dict of tensors per input, on the encoder's device. An item does not depend on the rest of the list.
        """


class ImageEncoder(FrozenEncoder):
    """Images -> {"latents": (C, H, W), "std": (C, H, W)}, float32: normalised mean and std of the posterior."""


class TextEncoder(FrozenEncoder):
    """Captions -> tensors with the names and shapes of `shapes`, in `dtype`, and LENGTH."""

    num_tokens: int
    """Tokens per caption; longer captions are truncated, shorter ones padded."""
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype


# --- layers ------------------------------------------------------------------------------------------------------------


class BlockLayer(nn.Module, ABC):
    """One of the repeated blocks. While `skipped` is set it returns its input: for guidance only, never in training."""

    skipped: bool = False

    @abstractmethod
    def recompute_norms(self, active: bool) -> None:
        """Chooses whether norms, modulation and activation functions are computed again in the backward pass.

        The inputs of linear layers are then not kept; their outputs are.
        """


@dataclass(frozen=True)
class LayerCost:
    """What a layer computes in the forward pass of one micro-batch; utils/pipeline/cost.py turns it into FLOPs."""

    rows: Mapping[str, int]
    """Linear module or convolution (name within the layer) -> number of rows that its weight is multiplied with."""
    attention_flops: float = 0.0
    """FLOPs of the products of queries with keys, and of attention weights with values."""
    constant_inputs: frozenset[str] = frozenset()
    """The modules whose inputs are inputs of the network, which need no gradient."""


@dataclass(frozen=True)
class PipelineLayer:
    """One indivisible step of the network: the unit in which the pipeline divides it into stages."""

    name: str
    """For tables and messages."""
    prefix: str
    """Turns a parameter name within this layer into the family's native name, such as "joint_blocks.3."."""
    cost: Callable[[SampleShape], LayerCost]
    """What the layer computes for a micro-batch of that shape."""
    shapes: Mapping[str, tuple[int, ...]]
    """Parameter name within the layer -> shape."""
    build: Callable[[], nn.Module]
    """Builds the layer on the CPU, reading its own weights only. On the meta device for a family from `from_variant`."""
    outputs: tuple[StreamSpec, ...] = ()
    """The streams the layer returns; none for the last layer, which returns one tensor."""
    block: int | None = None
    """Index among the repeated blocks, for a layer that is one; `build` then returns a BlockLayer."""
    build_empty: Callable[[], nn.Module] | None = None
    """Builds the layer on the meta device without reading weights; required where layers are timed before they are read."""

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


# --- adapters ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleAdapter:
    """The tensors of an adapter for one module with weight W (out, in), or (out, in, k, k) of a convolution.

    Low rank: `down` (rank, in) and `up` (out, rank), for a convolution (rank, in, k, k) and (out, rank, 1, 1); the update is
    scale * up @ down. With `magnitude` (out,) (DoRA), each row of W + update is scaled to that norm.
    Kronecker (LoKr): the update is scale * kron(w1, w2); each factor may be given as a product, `w1_a` @ `w1_b`.
    """

    tensors: Mapping[str, Tensor]
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """A public LoRA, DoRA or LoKr file whose header has been read and checked; tensors are read module by module."""

    path: Path
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Native module name -> tensor name of ModuleAdapter -> shape."""
    read: Callable[[str], ModuleAdapter]
    """Native module name -> its adapter, float32."""
    skipped_keys: tuple[str, ...]
    """Keys that belong to other networks, such as text encoders."""


# --- exports -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportNames:
    """File and folder names of exports of the whole network."""

    network_file: str
    """The network alone, with native keys."""
    complete_file: str
    """The network with the frozen encoders and decoder in one file."""
    diffusers_folder: str
    diffusers_stem: str
    """Beginning of the file names of shards and index in the diffusers folder."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor to be written into a public file; read only when it is written."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[torch.dtype], Tensor]
    """Returns the tensor on the CPU, rounded once to the given dtype."""
    dtype: torch.dtype | None = None
    """Dtype it must be stored in; None: that of the file."""


class ModelFamily(ABC):
    """A model of some family: its encoders, its layers, and the names and formats of its files."""

    export_names: ExportNames
    latent: LatentSpec
    layer_list_version: int
    """Incremented when the meaning of `layers` changes: training checkpoints name layers by their index."""
    network_files: tuple[Path, ...]
    """The files the layers are read from, including adapters merged into them. Empty for a family from `from_variant`."""
    network_settings: Mapping[str, Any]
    """Everything else the initial weights of the network depend on."""
    layers: tuple[PipelineLayer, ...]
    input_names: tuple[str, ...]
    """Names of the tensors the first layer takes."""
    stream_width: int
    """Width of the streams between layers."""
    adaptable_modules: Mapping[str, tuple[int, ...]]
    """Native name of every module that can have an adapter -> shape of its weight."""
    lora_target_groups: Mapping[str, str]
    """Name of a group of modules -> regular expression that matches their whole native names."""
    default_lora_targets: tuple[str, ...]
    """Groups that get an adapter when the configuration names none."""
    num_blocks: int
    native_prefix: str
    """Prefix of the network's native names in a single file that contains other networks too."""
    sources: Mapping[str, Path]
    """Key of the [model] table -> file or folder it is read from. Empty for a family from `from_variant`."""
    notes: tuple[str, ...]
    """Remarks on the files for the start banner."""

    @classmethod
    @abstractmethod
    def from_files(cls, settings: Any) -> Self:
        """Opens and checks the files that the [model] table (the family's settings class) names; reads headers only.

        Raises ModelFilesError with every error of every file.
        """

    @classmethod
    @abstractmethod
    def from_variant(cls, name: str) -> Self:
        """Returns the released variant of that name without any files: shapes, costs, names and layers on the meta device.

        Settings that `from_files` takes from the [model] table have its defaults. What requires files (encoders, decoder,
        frozen tensors) raises NoFilesError. Raises ValueError for an unknown name.
        """

    @property
    @abstractmethod
    def image_encoder(self) -> ImageEncoder: ...

    @property
    @abstractmethod
    def text_encoders(self) -> tuple[TextEncoder, ...]: ...

    @abstractmethod
    def describe(self) -> str:
        """Returns variant and precision in one line, for the start banner."""

    # --- the network ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def block_of(self, module: str) -> int | None:
        """Returns the index of the repeated block that contains a module (native name); None outside of the blocks."""

    @abstractmethod
    def sample_shape(self, batch: int, height: int, width: int) -> SampleShape:
        """Returns the shape of what `sample` returns for `batch` latents of these sizes in latent pixels."""

    @abstractmethod
    def sample(self, noisy_latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> Sample:
        """Returns the inputs of the first layer for one micro-batch.

        noisy_latents (B, C, H, W) in the training dtype, sigma (B,) float32 in [0, 1], text: cached tensors stacked over
        the batch, keyed "encoder.tensor".
        """

    @abstractmethod
    def velocity(self, output: Tensor, shape: SampleShape) -> Tensor:
        """Returns the output of the last layer as a velocity (B, C, H, W)."""

    @staticmethod
    @abstractmethod
    def shift_at(shift: float, base_pixels: int, num_pixels: int) -> float:
        """Returns the timestep shift for images of `num_pixels`, where `shift` is that for images of `base_pixels`."""

    @abstractmethod
    def load_decoder(self, device: torch.device, tile_pixels: int) -> DecodeFunction:
        """Reads the image decoder; the returned function maps latents (B, C, H, W) to uint8 pixels (B, 3, h, w).

        Images with a side above `tile_pixels`, a multiple of 4 * downscale, are decoded in tiles of that size which overlap
        by a quarter. This bounds memory to that of one tile and changes the pixels slightly.
        """

    # --- public files --------------------------------------------------------------------------------------------------

    @abstractmethod
    def open_lora_file(self, path: Path) -> LoraFile:
        """Opens an adapter for this network in any public format. Raises ModelFilesError with empty keys."""

    @abstractmethod
    def native_adapter(self, modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
        """Returns the tensors of adapters (native module name -> adapter) under the keys of native files."""

    @abstractmethod
    def diffusers_adapter(self, modules: Mapping[str, ModuleAdapter]) -> dict[str, Tensor]:
        """Returns the tensors of low-rank adapters (native module name -> adapter) under diffusers' keys, scale included."""

    @abstractmethod
    def diffusers_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames tensors of whole modules from native to diffusers' names; copies only where the layout differs."""

    @abstractmethod
    def diffusers_config(self) -> dict[str, Any]:
        """Returns config.json of the network in diffusers' layout."""

    @abstractmethod
    def frozen_tensors(self) -> list[FileTensor]:
        """Returns the tensors of autoencoder and text encoders that a complete single file has besides the network.

        Raises ModelFilesError when a single file cannot represent how they are built.
        """

    @abstractmethod
    def export_metadata(self) -> dict[str, str]:
        """Returns the standard safetensors header entries that name the architecture."""

    @abstractmethod
    def adapter_metadata(self, is_plain_lora: bool) -> dict[str, str]:
        """Returns the header entries of a native adapter file that name the program module which reads it.

        is_plain_lora: True for LoRA, False for DoRA and LoKr.
        """
