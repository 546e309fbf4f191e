"""The network's public files, in: which variant they hold, whether they are whole, and one layer at a time.

Read are the native single file, with or without `model.diffusion_model.` before its names and with or without encoders
beside the network, and diffusers' folder. Nothing here reads more than it is asked for: headers to tell the variant and to
check it, and single tensors to build one layer. No function returns a whole network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from models.family import LoraFile, ModelFilesError
from models.sd3 import diffusers_names
from models.sd3.layers import layer_prefix, make_layer
from models.sd3.lora_files import merged
from models.sd3.mmdit import HEAD_WIDTH, MMDiT, MMDiTConfig
from models.sd3.sources import what_it_is
from models.tensor_files import TensorFiles, shape_errors

CHECKPOINT_PREFIX = "model.diffusion_model."
Shape = tuple[int, ...]


# --- telling the variant ------------------------------------------------------------------------------------------------

_DEFINING_TENSORS = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "context_embedder.weight": 2,
    "y_embedder.mlp.0.weight": 2,
}
"""Tensors the network's shape is read from, and how many axes each has."""


def detect_config(shapes: Mapping[str, Shape], own_name: Callable[[str], str] = str) -> MMDiTConfig:
    """The network's shape from the shapes of its tensors. Raises ValueError when a defining tensor is missing or odd.

    own_name: what messages call a tensor.
    """
    missing = [own_name(name) for name in _DEFINING_TENSORS if name not in shapes]
    blocks = {int(m.group(1)) for name in shapes if (m := re.match(r"joint_blocks\.(\d+)\.", name))}
    if missing or not blocks:
        raise ValueError(f"has no {', '.join(missing) or 'joint_blocks.*'}")
    odd = [name for name, num_axes in _DEFINING_TENSORS.items() if len(shapes[name]) != num_axes]
    if odd:
        raise ValueError(
            "; ".join(
                f"has tensor {own_name(name)} of shape {shapes[name]}, expected {_DEFINING_TENSORS[name]} axes"
                for name in odd
            )
        )
    hidden, channels, patch = shapes["x_embedder.proj.weight"][:3]
    if hidden % HEAD_WIDTH:
        raise ValueError(f"is {hidden} wide, no multiple of the head width, {HEAD_WIDTH}")
    depth = max(blocks) + 1
    return MMDiTConfig(
        patch_size=patch,
        in_channels=channels,
        depth=depth,
        hidden_size=hidden,
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
        pos_embed_max_size=math.isqrt(shapes["pos_embed"][1]),
        qk_norm=any(".attn.ln_" in name for name in shapes),
        dual_attention_layers=tuple(
            index for index in range(depth) if any(f"joint_blocks.{index}.x_block.attn2." in name for name in shapes)
        ),
    )


def expected_shapes(config: MMDiTConfig) -> dict[str, Shape]:
    """Native tensor name -> shape of a whole network; allocates nothing."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in MMDiT(config).state_dict().items()}


def adaptable_modules(config: MMDiTConfig) -> dict[str, Shape]:
    """Native name of every linear and convolution -> shape of its weight; allocates nothing."""
    with torch.device("meta"):
        modules = MMDiT(config).named_modules()
        return {name: tuple(m.weight.shape) for name, m in modules if isinstance(m, nn.Linear | nn.Conv2d)}


# --- the network -------------------------------------------------------------------------------------------------------


class NetworkFiles:
    """A checked network on disk: its shape, and one layer at a time.

    `merge`: adapters added to the weights as they are read, each with a strength. Raises ModelFilesError with every error.
    """

    def __init__(self, tensors: TensorFiles) -> None:
        self.source = tensors.source
        self.paths = tensors.paths
        names = list(tensors.shapes)
        if any(name.startswith(CHECKPOINT_PREFIX) for name in names):
            tensors = tensors.within(CHECKPOINT_PREFIX)
        self._is_diffusers = any(name.startswith("transformer_blocks.") for name in tensors.shapes)
        if not self._is_diffusers:
            tensors = tensors.without(_is_beside_the_network)
        self._tensors = tensors
        self._merge: list[tuple[LoraFile, float]] = []
        found = tensors.shapes
        try:
            if any(name.startswith("controlnet_blocks.") for name in found):  # otherwise much like a network
                raise ValueError("has controlnet_blocks.*")
            self.config = detect_config(
                diffusers_names.native_shapes(found) if self._is_diffusers else found, self._first_own_name
            )
        except ValueError as error:
            what = what_it_is(names)
            raise ModelFilesError([("mmdit", f"{self.source} is {what}, not a whole SD3 network: it {error}")]) from error
        errors = shape_errors(found, self._expected_shapes()) + tensors.unreadable()
        if errors:
            looks_like = f"{self.source}, by its shapes {variant_name(self.config)},"
            raise ModelFilesError([("mmdit", f"{looks_like} {error}") for error in errors])

    def _first_own_name(self, name: str) -> str:
        """What the files call a native tensor, or the first part of it."""
        return diffusers_names.diffusers_names(name)[0] if self._is_diffusers else name

    def _expected_shapes(self) -> dict[str, Shape]:
        """In the files' own names."""
        expected = expected_shapes(self.config)
        if not self._is_diffusers:
            return expected
        return {
            own_name: tuple(part.shape)
            for name, shape in expected.items()
            for own_name, part in diffusers_names.to_diffusers(
                name, torch.empty(shape, device="meta"), self.config.depth
            ).items()
        }

    def merge(self, file: LoraFile, strength: float) -> None:
        """Have every layer read from now on carry this adapter."""
        self._merge.append((file, strength))

    def layer_shapes(self, index: int) -> dict[str, Shape]:
        """Parameter name within layer `index` -> shape."""
        with torch.device("meta"):
            layer = make_layer(self.config, index)
        return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}

    def load_layer(self, index: int, dtype: torch.dtype) -> nn.Module:
        """Layer `index` of layers.py with its weights in `dtype`, on the CPU; reads only this layer's tensors.

        The position table stays in float32: it is a constant, and two bytes cannot tell its neighbouring rows apart.
        """
        with torch.device("meta"):
            layer = make_layer(self.config, index)
        prefix = layer_prefix(self.config, index)
        buffers = {name for name, _ in layer.named_buffers()}
        state = {name: self._read(prefix + name, torch.float32 if name in buffers else dtype) for name in layer.state_dict()}
        layer.load_state_dict(state, assign=True)
        return layer

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor by its native name, with the adapters that touch it merged in."""
        module = name.removesuffix(".weight")
        merges = [(file, strength) for file, strength in self._merge if name != module and module in file.shapes]
        tensor = self._read_stored(name, torch.float32 if merges else dtype)
        for file, strength in merges:
            tensor = merged(tensor, file.read(module), strength)
        return tensor.to(dtype)

    def _read_stored(self, name: str, dtype: torch.dtype) -> Tensor:
        if not self._is_diffusers:
            return self._tensors.read_one(name, dtype)
        parts = [self._tensors.read_one(own_name, dtype) for own_name in diffusers_names.diffusers_names(name)]
        return diffusers_names.to_native(name, parts, self.config.depth)


_BESIDE = ("first_stage_model.", "vae.", "text_encoders.", "model_ema.", "conditioner.")


def _is_beside_the_network(name: str) -> bool:
    """Tensors that a single file may hold besides those of the network; the others must be the network's."""
    return name.startswith(_BESIDE)


# --- names of variants -------------------------------------------------------------------------------------------------


def variant_name(config: MMDiTConfig) -> str:
    """The released model this network has the shape of, or a description of it."""
    if config.hidden_size == 2432 and config.depth == 38 and config.qk_norm:
        return "SD3.5-large (or large-turbo, which has the same shapes)"
    if config.hidden_size == 1536 and config.depth == 24:
        return "SD3.5-medium" if config.dual_attention_layers else "SD3-medium"
    kind = "SD3.5-medium-like" if config.dual_attention_layers else "SD3.5-large-like" if config.qk_norm else "SD3-like"
    return f"{kind} (width {config.hidden_size}, depth {config.depth})"


def architecture_id(config: MMDiTConfig) -> str:
    """modelspec.architecture of the family member nearest in kind."""
    if config.dual_attention_layers:
        return "stable-diffusion-3-5-medium"
    return "stable-diffusion-3-5-large" if config.qk_norm else "stable-diffusion-3-medium"
