"""Public file formats of the network, to and from our names, which are the native ones.

Nothing here reads more than it is asked for: headers to tell the variant and to check a file, and single tensors to build
one layer. No function returns a whole network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.base import LoraWeights, ModelFilesError
from models.sd3.layers import layer_prefix, make_layer
from models.sd3.mmdit import HEAD_WIDTH, MMDiT, MMDiTConfig

CHECKPOINT_PREFIX = "model.diffusion_model."
MAX_PROBLEMS_SHOWN = 8
Shape = tuple[int, ...]


# --- reading -----------------------------------------------------------------------------------------------------------


def read_shapes(path: Path) -> tuple[dict[str, Shape], str]:
    """Native tensor name -> shape, and the prefix the names carry in the file; reads the header only.

    Raises ModelFilesError when the file is missing or is no safetensors file.
    """
    if path.is_dir():
        raise ModelFilesError([("mmdit", f"{path} is a folder; give the .safetensors file with native keys")])
    if not path.is_file():
        raise ModelFilesError([("mmdit", f"{path} does not exist")])
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            prefix = CHECKPOINT_PREFIX if any(name.startswith(CHECKPOINT_PREFIX) for name in names) else ""
            wanted = [name for name in names if name.startswith(prefix)]
            return {name[len(prefix) :]: tuple(file.get_slice(name).get_shape()) for name in wanted}, prefix
    except (SafetensorError, OSError) as error:
        raise ModelFilesError([("mmdit", f"{path} is not a readable safetensors file: {error}")]) from error


_DEFINING_TENSORS = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "context_embedder.weight": 2,
    "y_embedder.mlp.0.weight": 2,
}
"""Tensors the network's shape is read from, and how many axes each has."""


def detect_config(shapes: Mapping[str, Shape]) -> MMDiTConfig:
    """The network's shape from the shapes of its tensors. Raises ModelFilesError when a defining tensor is missing."""
    missing = [name for name in _DEFINING_TENSORS if name not in shapes]
    blocks = {int(m.group(1)) for name in shapes if (m := re.match(r"joint_blocks\.(\d+)\.", name))}
    if missing or not blocks:
        what = ", ".join(missing) or "joint_blocks.*"
        raise ModelFilesError([("mmdit", f"not an SD3 network with native keys: it has no {what}")])
    odd = [name for name, num_axes in _DEFINING_TENSORS.items() if len(shapes[name]) != num_axes]
    if odd:
        text = "; ".join(f"tensor {name} has shape {shapes[name]}, expected {_DEFINING_TENSORS[name]} axes" for name in odd)
        raise ModelFilesError([("mmdit", text)])
    hidden, channels, patch = shapes["x_embedder.proj.weight"][:3]
    if hidden % HEAD_WIDTH:
        raise ModelFilesError([("mmdit", f"width {hidden} is not a multiple of the head width, {HEAD_WIDTH}")])
    depth = max(blocks) + 1
    return MMDiTConfig(
        patch_size=patch,
        in_channels=channels,
        depth=depth,
        hidden_size=hidden,
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
        pos_embed_max_size=math.isqrt(shapes["pos_embed"][1]),
        qk_norm="joint_blocks.0.x_block.attn.ln_k.weight" in shapes,
        dual_attention_layers=tuple(
            index for index in range(depth) if f"joint_blocks.{index}.x_block.attn2.qkv.weight" in shapes
        ),
    )


def expected_shapes(config: MMDiTConfig) -> dict[str, Shape]:
    """Native tensor name -> shape of a whole network; allocates nothing."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in MMDiT(config).state_dict().items()}


def linear_module_names(config: MMDiTConfig) -> tuple[str, ...]:
    """Native names of every linear module of a whole network; allocates nothing."""
    with torch.device("meta"):
        return tuple(name for name, module in MMDiT(config).named_modules() if isinstance(module, nn.Linear))


def shape_problems(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """One line for each tensor that is missing, misshapen or not the network's."""
    problems = [f"misses tensor {name} {expected[name]}" for name in expected if name not in found]
    problems += [
        f"tensor {name} has shape {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    problems += [f"has tensor {name}, which this network does not have" for name in found if name not in expected]
    if len(problems) > MAX_PROBLEMS_SHOWN:
        rest = len(problems) - MAX_PROBLEMS_SHOWN
        problems = [*problems[:MAX_PROBLEMS_SHOWN], f"and {rest} more tensors that do not fit"]
    return problems


class MMDiTFile:
    """A checked single-file network: its shape, and one layer at a time. Raises ModelFilesError with every problem."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes, self._prefix = read_shapes(path)
        self.config = detect_config(self.shapes)
        problems = shape_problems(self.shapes, expected_shapes(self.config))
        if problems:
            raise ModelFilesError([("mmdit", f"{path} {problem}") for problem in problems])

    def layer_shapes(self, index: int, context_length: int) -> dict[str, Shape]:
        """Parameter name within layer `index` -> shape."""
        with torch.device("meta"):
            layer = make_layer(self.config, index, context_length)
        return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}

    def load_layer(self, index: int, context_length: int, dtype: torch.dtype) -> nn.Module:
        """Layer `index` of layers.py with its weights in `dtype`, on the CPU; reads only this layer's tensors.

        The position table stays in float32: it is a constant, and two bytes cannot tell its neighbouring rows apart.
        """
        with torch.device("meta"):
            layer = make_layer(self.config, index, context_length)
        prefix = self._prefix + layer_prefix(self.config, index)
        buffers = {name for name, _ in layer.named_buffers()}
        with safe_open(self.path, "pt") as file:
            state = {
                name: file.get_tensor(prefix + name).to(torch.float32 if name in buffers else dtype)
                for name in layer.state_dict()
            }
        layer.load_state_dict(state, assign=True)
        return layer


# --- names of variants -------------------------------------------------------------------------------------------------


def variant_name(config: MMDiTConfig) -> str:
    """The released model this network has the shape of, or a description of it."""
    if config.hidden_size == 2432 and config.depth == 38:
        return "SD3.5-large"
    if config.hidden_size == 1536 and config.depth == 24:
        return "SD3.5-medium" if config.dual_attention_layers else "SD3-medium"
    kind = "SD3.5-medium-like" if config.dual_attention_layers else "SD3.5-large-like" if config.qk_norm else "SD3-like"
    return f"{kind} (width {config.hidden_size}, depth {config.depth})"


def architecture_id(config: MMDiTConfig) -> str:
    """modelspec.architecture of the family member nearest in kind."""
    if config.dual_attention_layers:
        return "stable-diffusion-3-5-medium"
    return "stable-diffusion-3-5-large" if config.qk_norm else "stable-diffusion-3-medium"


# --- LoRA keys ---------------------------------------------------------------------------------------------------------


def native_lora_tensors(lora: LoraWeights) -> dict[str, Tensor]:
    """sd-scripts' and ComfyUI's keys: lora_unet_<module with underscores>.lora_{down,up}.weight and .alpha."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in lora.pairs.items():
        key = "lora_unet_" + module.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up
        tensors[f"{key}.alpha"] = torch.tensor(lora.alpha, dtype=down.dtype)
    return tensors


def diffusers_lora_tensors(lora: LoraWeights, config: MMDiTConfig) -> dict[str, Tensor]:
    """diffusers' keys: transformer.<module>.lora_{A,B}.weight, with alpha / rank multiplied into B.

    A fused qkv becomes three modules that share A and take a third of B's rows each; where diffusers stores (scale, shift)
    for our (shift, scale), B's halves change places.
    """
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in lora.pairs.items():
        scaled = up.float() * (lora.alpha / down.shape[0])
        names = diffusers_modules(module, config)
        if swaps_halves(module, config):
            scaled = torch.cat(scaled.chunk(2)[::-1])
        for name, rows in zip(names, scaled.chunk(len(names)), strict=True):
            tensors[f"transformer.{name}.lora_A.weight"] = down.clone()
            tensors[f"transformer.{name}.lora_B.weight"] = rows.contiguous().to(up.dtype)
    return tensors


_TOP_LEVEL_MODULES = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_BLOCK_MODULES = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}


def diffusers_modules(module: str, config: MMDiTConfig) -> tuple[str, ...]:
    """diffusers' names for a native module with weights: one, or three for a fused qkv. Raises KeyError for others."""
    match = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return (_TOP_LEVEL_MODULES[module],)
    assert int(match.group(1)) < config.depth
    return tuple(f"transformer_blocks.{match.group(1)}.{name}" for name in _BLOCK_MODULES[match.group(2)])


def swaps_halves(module: str, config: MMDiTConfig) -> bool:
    """True where diffusers stores (scale, shift) for the native (shift, scale)."""
    last_context = f"joint_blocks.{config.depth - 1}.context_block.adaLN_modulation.1"
    return module in ("final_layer.adaLN_modulation.1", last_context)
