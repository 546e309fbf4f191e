"""Finds the files of each component of a model: network, autoencoder and three text encoders.

A component has a path of its own in the [model] table, or is found inside what `mmdit` names: in the folder of a whole
diffusers pipeline, or in a single file next to the network, under the prefixes of the public checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.family import FileErrors
from models.sd3.settings import SD3Settings
from models.tensor_files import TensorFiles, TensorFilesError, open_any, open_folder

TEXT_ENCODERS = ("clip_l", "clip_g", "t5xxl")
FOLDERS = {"vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
"""Component -> its folder in a diffusers pipeline."""
PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    **{name: (f"text_encoders.{name}.transformer.", f"text_encoders.{name}.") for name in TEXT_ENCODERS},
}
"""Component -> prefixes of its tensors in a single file; the first is used by the public files and by exports."""


@dataclass(frozen=True)
class Component:
    """The files of one frozen network."""

    key: str
    """Its key in the [model] table, such as "clip_l"."""
    tensors: TensorFiles
    config: dict[str, Any] | None
    """config.json of a folder; None for a bare file, whose config follows from the shapes of its tensors."""
    folder: Path
    """Where related files, such as a tokenizer, are searched: the component's folder, or the folder of its file."""

    @property
    def files(self) -> tuple[Path, ...]:
        config = self.folder / "config.json"
        return (config, *self.tensors.paths) if self.config is not None else self.tensors.paths


def find_components(settings: SD3Settings) -> tuple[TensorFiles | None, dict[str, Component], FileErrors]:
    """Reads the headers of every component: (network, other components by key, errors of those not found)."""
    errors: FileErrors = []
    if settings.clip_l is False and settings.clip_g is False and settings.t5xxl is False:
        errors.append(("clip_l", "all three text encoders are off; captions need at least one of clip_l, clip_g, t5xxl"))
    network = None
    try:
        network = _open_network(settings.mmdit)
    except (TensorFilesError, OSError) as error:  # OSError: an invalid path
        errors.append(("mmdit", str(error)))
    components: dict[str, Component] = {}
    paths = {"vae": settings.vae, "clip_l": settings.clip_l, "clip_g": settings.clip_g, "t5xxl": settings.t5xxl}
    for key, path in paths.items():
        try:
            if path:
                components[key] = _component_at(key, path)
            elif path is None and network is not None:  # without a network, its own error is the one to fix first
                components[key] = _component_inside(key, settings.mmdit, network)
        except (TensorFilesError, OSError) as error:
            errors.append((key, str(error)))
    return network, components, errors


def _open_network(path: Path) -> TensorFiles:
    if (path / "transformer").is_dir():
        return open_folder(path / "transformer")
    return open_any(path)


def _component_at(key: str, path: Path) -> Component:
    """Opens a component in its own folder or file, or in a single file that contains it among others."""
    if path.is_dir():
        return _component_in_folder(key, path)
    tensors = open_any(path)
    return Component(key, _without_prefix(key, tensors) or tensors, None, path.parent)


def _component_in_folder(key: str, folder: Path) -> Component:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise TensorFilesError(f"{folder} has no config.json; set the folder of {_kind(key)}, or one safetensors file")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TensorFilesError(f"{config_file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise TensorFilesError(f"{config_file} is not a table of settings")
    invalid = [line for table in (config, config.get("text_config", {})) for line in _setting_errors(table)]
    if invalid:
        raise TensorFilesError(f"{config_file}: {'; '.join(invalid)}")
    return Component(key, open_folder(folder), config, folder)


_INTEGER_SETTINGS = (
    ("latent_channels", "layers_per_block", "norm_num_groups", "in_channels")
    + ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim")
    + ("vocab_size", "max_position_embeddings", "d_model", "d_ff", "d_kv", "num_layers", "num_heads")
    + ("relative_attention_num_buckets",)
)
"""Settings of autoencoder, CLIP and T5 from which tensor shapes are computed."""


def _setting_errors(table: object) -> list[str]:
    """Returns one line for each setting from which tensor shapes cannot be computed."""
    if not isinstance(table, dict):
        return [f"text_config = {table!r}: must be a table"]
    lines = [
        f"{key} = {table[key]!r}: must be an integer above 0"
        for key in _INTEGER_SETTINGS
        if key in table and not _is_positive_integer(table[key])
    ]
    widths = table.get("block_out_channels", [1])
    if not (isinstance(widths, list) and widths and all(_is_positive_integer(width) for width in widths)):
        lines.append(f"block_out_channels = {widths!r}: must be a list of integers above 0")
    return lines


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _component_inside(key: str, mmdit: Path, network: TensorFiles) -> Component:
    """Opens a component of the pipeline folder, or of the single file, that `mmdit` names."""
    or_off = "" if key == "vae" else f", or {key} = false to train without it"
    if (mmdit / "transformer").is_dir():
        if (mmdit / FOLDERS[key]).is_dir():
            return _component_in_folder(key, mmdit / FOLDERS[key])
        raise TensorFilesError(f"is not set, and {mmdit} has no folder {FOLDERS[key]}; set {key} = PATH{or_off}")
    inside = _without_prefix(key, network)
    if inside is None:
        raise TensorFilesError(f"is not set, and {mmdit} does not contain it; set {key} = PATH{or_off}")
    return Component(key, inside, None, mmdit.parent)


def _without_prefix(key: str, tensors: TensorFiles) -> TensorFiles | None:
    """Returns the component's tensors in a single file, names without their prefix; None when it has none."""
    for prefix in PREFIXES[key]:
        inside = tensors.within(prefix)
        if len(inside):
            return inside
    return None


def _kind(key: str) -> str:
    return "a diffusers AutoencoderKL" if key == "vae" else "a transformers text encoder"


# --- recognizing other files -------------------------------------------------------------------------------------------

_KNOWN_NAMES = (
    ("lora_down.", "a LoRA"),
    ("lora_A.", "a LoRA"),
    ("lora.down.", "a LoRA"),
    ("lokr_w", "a LoKr adapter"),
    ("controlnet_blocks.", "a ControlNet"),
    ("double_blocks.", "a Flux transformer"),
    ("single_transformer_blocks.", "a Flux transformer in diffusers' layout"),
    ("input_blocks.", "the UNet of Stable Diffusion 1, 2 or XL"),
    ("down_blocks.", "a UNet or autoencoder in diffusers' layout"),
    ("joint_blocks.", "an SD3 network with native keys"),
    ("transformer_blocks.", "a transformer in diffusers' layout"),
    ("first_stage_model.", "an autoencoder"),
    ("decoder.conv_in", "an autoencoder"),
    ("text_model.", "a CLIP text encoder"),
    ("encoder.block.", "a T5 text encoder"),
)
"""(part of a tensor name, the network that has it), most specific first."""


def describe_tensors(names: Sequence[str]) -> str:
    """Returns which kind of network has tensors of these names, for error messages."""
    for part, network in _KNOWN_NAMES:
        if any(part in name for name in names):
            return network
    first = ", ".join(sorted(names)[:3])
    return f"something unknown (its first tensors: {first})" if names else "a file without tensors"
