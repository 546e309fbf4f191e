"""The contract between a model family and the trainer.

The trainer knows latents, encoders and a flat list of layers, and nothing about any one network. A family
(one folder beside this file) gives it a `ModelAdapter`; everything the trainer ever asks of a model is on this page.

Shapes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EncodedItem = dict[str, Tensor]
EncodeFunction = Callable[[Sequence[Any]], list[EncodedItem]]
DecodeFunction = Callable[[Tensor], Tensor]


class ModelFilesError(ValueError):
    """The files of a model are missing or do not fit; `problems` holds (key of the [model] table, what is wrong)."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in problems))
        self.problems = list(problems)


def read_pretrained_config(folder: Path, kind: str) -> dict[str, Any]:
    """config.json of a folder in Hugging Face's layout, which must also hold safetensors weights.

    `kind` says what should be there. Raises ValueError saying what is wrong.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of {kind}")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no .safetensors file (pickled .bin weights are not read)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a table of settings")
    return config


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


class FrozenEncoder(ABC):
    """A network that turns pictures or captions into cached tensors and is never trained.

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
        tensors on the CPU comes back for each input.
        """


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

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


class ModelAdapter(ABC):
    """A model family, ready to be encoded with, cut into stages, trained and exported."""

    latent: LatentSpec
    layer_list_version: int
    """Changes with what `layers` means: training checkpoints name layers by their place in it."""
    network_files: tuple[Path, ...]
    """The files the layers are read from."""
    image_encoder: FrozenEncoder
    text_encoders: tuple[FrozenEncoder, ...]
    layers: tuple[PipelineLayer, ...]
    linear_modules: tuple[str, ...]
    """Native names of every linear module: what a low-rank adapter can be put on."""
    default_lora_targets: tuple[str, ...]

    @abstractmethod
    def describe(self) -> str:
        """The variant and its size in one line, for the start banner."""

    @abstractmethod
    def network_inputs(self, noisy_latents: Tensor, sigma: Tensor, text: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the first layer takes.

        noisy_latents (B, C, H, W) in the training dtype, sigma (B,) float32 in [0, 1], text: cached tensors stacked over
        the batch, keyed "encoder.tensor".
        """

    @abstractmethod
    def velocity(self, output: Tensor, height: int, width: int) -> Tensor:
        """The last layer's output as a velocity (B, C, height, width), sizes in latent pixels."""

    @abstractmethod
    def load_decoder(self, device: torch.device) -> DecodeFunction:
        """Read the image decoder; the function returned maps latents (B, C, H, W) to uint8 pixels (B, 3, h, w)."""

    @abstractmethod
    def native_lora(self, lora: LoraWeights) -> dict[str, Tensor]:
        """The adapter's tensors of some layers under the keys native tools read."""

    @abstractmethod
    def diffusers_lora(self, lora: LoraWeights) -> dict[str, Tensor]:
        """The adapter's tensors of some layers under diffusers' keys, alpha folded in."""

    @abstractmethod
    def export_metadata(self) -> dict[str, str]:
        """Standard safetensors header entries that name the architecture."""


@dataclass(frozen=True)
class LoraWeights:
    """Low-rank pairs by native module name: module -> (down (rank, in), up (out, rank)), and their common alpha."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float
