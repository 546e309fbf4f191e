"""Files of the autoencoder: config and tensor names of diffusers' folder and of the native file, checks, and exports.

A native file has no config next to its tensors: sizes follow from the tensor shapes, and the rest is SD3's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.family import FileErrors, FileTensor
from models.sd3.sources import PREFIXES, Component, describe_tensors
from models.sd3.variants import Shape
from models.tensor_files import shape_errors

SPATIAL_DOWNSCALE = 8
SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609
NATIVE_NORM_GROUPS = 32


def names_in_files(component: Component) -> dict[str, str]:
    """Returns AutoencoderKL's name of every tensor -> its name in the files."""
    if component.config is None:
        return native_names(native_config(component.tensors.shapes))
    return {_newer_name(name): name for name in component.tensors.shapes}


_OLDER_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _newer_name(name: str) -> str:
    """Translates the names of attention tensors from before diffusers 0.18, which some folders still have."""
    for new, old in _OLDER_ATTENTION.items():
        name = name.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
    return name


# --- the native file ---------------------------------------------------------------------------------------------------


def diffusers_name(name: str, num_levels: int) -> str:
    """Returns AutoencoderKL's name of a native tensor. Source: CompVis/latent-diffusion, diffusionmodules/model.py."""
    name = re.sub(r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
    name = re.sub(r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
    level = re.match(r"decoder\.up\.(\d+)\.", name)
    if level:  # the two layouts number the decoder's levels in opposite order
        up = f"decoder.up_blocks.{num_levels - 1 - int(level.group(1))}."
        name = up + name[level.end() :].replace("block.", "resnets.").replace("upsample.", "upsamplers.0.")
    name = name.replace("mid.block_1.", "mid_block.resnets.0.").replace("mid.block_2.", "mid_block.resnets.1.")
    name = name.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")
    for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"mid.attn_1.{old}.", f"mid_block.attentions.0.{new}.")
    return name


def native_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns AutoencoderKL's name of every tensor -> its native name."""
    full = {**_DEFAULTS, **config}
    return {diffusers_name(name, len(full["block_out_channels"])): name for name in native_shapes(full)}


def native_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Infers AutoencoderKL's config from the shapes of a native file. Raises ValueError if a defining tensor is missing."""
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
        if len(shapes.get(name, ())) != 4:
            raise ValueError(f"has no {name}")
    levels = {int(m.group(1)) for name in shapes if (m := re.match(r"encoder\.down\.(\d+)\.block\.0\.conv1\.", name))}
    blocks = {int(m.group(1)) for name in shapes if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))}
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(max(levels, default=0) + 1)]
    missing = [name for name in firsts if len(shapes.get(name, ())) != 4]
    if missing:
        raise ValueError(f"has no {missing[0]}")
    channels = [shapes[name][0] for name in firsts]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["encoder.conv_in.weight"][1],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "block_out_channels": channels,
        "layers_per_block": len(blocks),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": NATIVE_NORM_GROUPS,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": SCALING_FACTOR,
        "shift_factor": SHIFT_FACTOR,
    }


class _Shapes(dict[str, Shape]):
    """Native tensor name -> shape, added to by kind of module."""

    def conv(self, name: str, in_channels: int, out_channels: int, size: int = 3) -> None:
        self.update({f"{name}.weight": (out_channels, in_channels, size, size), f"{name}.bias": (out_channels,)})

    def norm(self, name: str, width: int) -> None:
        self.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def resnet(self, name: str, in_channels: int, out_channels: int) -> None:
        self.norm(f"{name}.norm1", in_channels)
        self.conv(f"{name}.conv1", in_channels, out_channels)
        self.norm(f"{name}.norm2", out_channels)
        self.conv(f"{name}.conv2", out_channels, out_channels)
        if in_channels != out_channels:
            self.conv(f"{name}.nin_shortcut", in_channels, out_channels, 1)

    def middle(self, name: str, width: int, has_attention: bool) -> None:
        for block in ("block_1", "block_2"):
            self.resnet(f"{name}.{block}", width, width)
        if has_attention:
            self.norm(f"{name}.attn_1.norm", width)
            for projection in ("q", "k", "v", "proj_out"):
                self.conv(f"{name}.attn_1.{projection}", width, width, 1)

    def levels(self, name: str, widths: Mapping[int, int], num_blocks: int, step: str) -> None:
        """Adds all levels. widths: level -> width, in order of execution; step: name of the resampling between levels."""
        in_channels = next(iter(widths.values()))
        for position, (level, width) in enumerate(widths.items()):
            for index in range(num_blocks):
                self.resnet(f"{name}.{level}.block.{index}", in_channels, width)
                in_channels = width
            if position < len(widths) - 1:
                self.conv(f"{name}.{level}.{step}.conv", width, width)


def native_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Returns native tensor name -> shape of an autoencoder of this config."""
    widths, latent, image_channels = config["block_out_channels"], config["latent_channels"], config["in_channels"]
    first, last, num_blocks = widths[0], widths[-1], config["layers_per_block"]
    shapes = _Shapes()
    shapes.conv("encoder.conv_in", image_channels, first)
    shapes.levels("encoder.down", dict(enumerate(widths)), num_blocks, "downsample")
    shapes.middle("encoder.mid", last, config["mid_block_add_attention"])
    shapes.norm("encoder.norm_out", last)
    shapes.conv("encoder.conv_out", last, 2 * latent)
    shapes.conv("decoder.conv_in", latent, last)
    shapes.middle("decoder.mid", last, config["mid_block_add_attention"])
    shapes.levels("decoder.up", dict(reversed(list(enumerate(widths)))), num_blocks + 1, "upsample")
    shapes.norm("decoder.norm_out", first)
    shapes.conv("decoder.conv_out", first, image_channels)
    if config["use_quant_conv"]:
        shapes.conv("quant_conv", 2 * latent, 2 * latent, 1)
    if config["use_post_quant_conv"]:
        shapes.conv("post_quant_conv", latent, latent, 1)
    return dict(shapes)


# --- checking and writing ----------------------------------------------------------------------------------------------


def vae_errors(component: Component, num_channels: int | None) -> FileErrors:
    """Returns the errors of the autoencoder's files; reads headers and config.json only.

    num_channels: latent channels of the network; None when it is not known.
    """
    source, shapes = component.tensors.source, component.tensors.shapes
    config = component.config
    if config is None:
        try:
            config = native_config(shapes)
        except ValueError as error:
            kind = describe_tensors(list(shapes))
            hint = "; set the path of its folder, which has its config.json" if "in diffusers' layout" in kind else ""
            return [("vae", f"{source} is {kind}, not a whole autoencoder with native keys: it {error}{hint}")]
        lines = shape_errors(shapes, native_shapes(config)) + component.tensors.storage_errors()
    else:
        lines = _folder_errors(component, config)
    channels, widths = config.get("latent_channels"), config.get("block_out_channels")
    if num_channels is not None and channels not in (None, num_channels):
        return [("vae", f"{source} has {channels} latent channels, the network has {num_channels}")]
    downscale = SPATIAL_DOWNSCALE if widths is None else 2 ** (len(widths) - 1)
    if downscale != SPATIAL_DOWNSCALE:
        return [("vae", f"{source} downscales images by {downscale}, SD3's autoencoder by {SPATIAL_DOWNSCALE}")]
    return [("vae", f"{source} {line}") for line in lines]


_DEFAULTS = {
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
"""Defaults of diffusers' class for settings that config.json omits."""


_OTHER_FAMILIES = {
    0.3611: "Flux",
    0.18215: "Stable Diffusion 1 or 2",
    0.13025: "Stable Diffusion XL",
}
"""scaling_factor -> the model family whose autoencoder has it."""


def _folder_errors(component: Component, config: Mapping[str, Any]) -> list[str]:
    """Returns one line for each setting that is not SD3's and each tensor that does not match the config."""
    needed = ("block_out_channels", "latent_channels", "scaling_factor", "shift_factor")
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        return [f"is not an autoencoder of SD3: its config.json has no {' and no '.join(missing)}"]
    other = _OTHER_FAMILIES.get(config["scaling_factor"])
    if other is not None:
        return [
            f"is the autoencoder of {other}: its scaling_factor is {config['scaling_factor']}, SD3's is {SCALING_FACTOR}"
        ]
    shapes = native_shapes({**_DEFAULTS, **config})
    expected = {name: shapes[native] for name, native in native_names(config).items()}
    found = {_newer_name(name): _as_convolution(shape) for name, shape in component.tensors.shapes.items()}
    return shape_errors(found, expected) + component.tensors.storage_errors()


def _as_convolution(shape: Shape) -> Shape:
    """Returns the shape as in native files, where the linear layers of the attention are 1 x 1 convolutions."""
    return (*shape, 1, 1) if len(shape) == 2 else shape


def scale_notes(component: Component) -> list[str]:
    """Returns remarks on latents that are scaled differently from SD3's."""
    released = {"scaling_factor": SCALING_FACTOR, "shift_factor": SHIFT_FACTOR}
    config = component.config if component.config is not None else released
    return [
        f"{component.tensors.source} has {key} {config.get(key)}; SD3's autoencoder has {value}"
        for key, value in released.items()
        if config.get(key) != value
    ]


def single_file_errors(component: Component) -> list[str]:
    """Returns one line for each setting that a single file, which has no config, cannot represent."""
    if component.config is None:
        return []
    implied = {"norm_num_groups": NATIVE_NORM_GROUPS, "scaling_factor": SCALING_FACTOR, "shift_factor": SHIFT_FACTOR}
    return [
        f"{component.tensors.source} has {key} {component.config.get(key)}; a single file always implies {value}"
        for key, value in implied.items()
        if component.config.get(key) != value
    ]


def file_tensors(component: Component) -> list[FileTensor]:
    """Returns the autoencoder's tensors as in a complete single file, float32."""
    native = native_names(component.config if component.config is not None else native_config(component.tensors.shapes))
    tensors = []
    for name, file_name in names_in_files(component).items():
        shape = _as_convolution(component.tensors.shapes[file_name])
        read = partial(_read_as, component, file_name, shape)
        tensors.append(FileTensor(PREFIXES["vae"][0] + native[name], shape, read, torch.float32))
    return tensors


def _read_as(component: Component, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    return component.tensors.read_one(name, dtype).reshape(shape)
