"""Which of the user's files holds which part of the model: network, autoencoder, three text encoders.

A part is given by its own path, or found inside what `mmdit` names: in the folder of a whole diffusers pipeline, or in a
single file beside the network, under the prefixes of the public checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.sd3.settings import SD3Settings
from models.tensor_files import TensorFiles, TensorFilesError, open_any, open_folder

TEXT_ENCODERS = ("clip_l", "clip_g", "t5xxl")
FOLDERS = {"vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
"""Of a diffusers pipeline."""
PREFIXES = {
    "vae": ("first_stage_model.", "vae."),
    **{name: (f"text_encoders.{name}.transformer.", f"text_encoders.{name}.") for name in TEXT_ENCODERS},
}
"""In a single file; the first is what the public files and ours have."""


@dataclass(frozen=True)
class Part:
    """One frozen network on disk."""

    key: str
    """Of the [model] table."""
    tensors: TensorFiles
    config: dict[str, Any] | None
    """config.json of a folder; None for a bare file, whose tensors say it all."""
    folder: Path
    """Where files that belong to it, such as a tokenizer, are looked for: its own folder, or the file's."""

    @property
    def files(self) -> tuple[Path, ...]:
        config = self.folder / "config.json"
        return (config, *self.tensors.paths) if self.config is not None else self.tensors.paths


def find_parts(settings: SD3Settings) -> tuple[TensorFiles | None, dict[str, Part], list[tuple[str, str]]]:
    """Open every part's headers: the network, the other parts by key, and what is wrong with those not there.

    Problems are (key, message).
    """
    errors: list[tuple[str, str]] = []
    if settings.clip_l is False and settings.clip_g is False and settings.t5xxl is False:
        errors.append(("clip_l", "all three text encoders are off; captions need one of clip_l, clip_g, t5xxl"))
    network = None
    try:
        network = _open_network(settings.mmdit)
    except (TensorFilesError, OSError) as error:  # OSError: no name that the system takes
        errors.append(("mmdit", str(error)))
    parts: dict[str, Part] = {}
    given = {"vae": settings.vae, "clip_l": settings.clip_l, "clip_g": settings.clip_g, "t5xxl": settings.t5xxl}
    for key, path in given.items():
        try:
            if path:
                parts[key] = _part_at(key, path)
            elif path is None and network is not None:  # where there is no network, that is what to mend first
                parts[key] = _part_inside(key, settings.mmdit, network)
        except (TensorFilesError, OSError) as error:
            errors.append((key, str(error)))
    return network, parts, errors


def _open_network(path: Path) -> TensorFiles:
    if (path / "transformer").is_dir():
        return open_folder(path / "transformer")
    return open_any(path)


def _part_at(key: str, path: Path) -> Part:
    """The part in a folder or file of its own, or in a single file that has it among others."""
    if path.is_dir():
        return _part_in_folder(key, path)
    tensors = open_any(path)
    return Part(key, _stripped(key, tensors) or tensors, None, path.parent)


def _part_in_folder(key: str, folder: Path) -> Part:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise TensorFilesError(f"{folder} has no config.json; give the folder of {_kind(key)}, or one safetensors file")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TensorFilesError(f"{config_file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise TensorFilesError(f"{config_file} is not a table of settings")
    unfit = [line for table in (config, config.get("text_config", {})) for line in _setting_errors(table)]
    if unfit:
        raise TensorFilesError(f"{config_file}: {'; '.join(unfit)}")
    return Part(key, open_folder(folder), config, folder)


_WHOLE_NUMBERS = (
    ("latent_channels", "layers_per_block", "norm_num_groups", "in_channels")
    + ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim")
    + ("vocab_size", "max_position_embeddings", "d_model", "d_ff", "d_kv", "num_layers", "num_heads")
    + ("relative_attention_num_buckets",)
)
"""Settings of the three kinds of networks that shapes follow from."""


def _setting_errors(table: object) -> list[str]:
    """Settings that shapes could not be worked out from."""
    if not isinstance(table, dict):
        return [f"text_config = {table!r}: must be a table"]
    lines = [
        f"{key} = {table[key]!r}: must be a whole number above 0"
        for key in _WHOLE_NUMBERS
        if key in table and not _is_count(table[key])
    ]
    widths = table.get("block_out_channels", [1])
    if not (isinstance(widths, list) and widths and all(_is_count(width) for width in widths)):
        lines.append(f"block_out_channels = {widths!r}: must be a list of whole numbers")
    return lines


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _part_inside(key: str, mmdit: Path, network: TensorFiles) -> Part:
    """The part beside the network, in a pipeline's folder or in one file."""
    off = "" if key == "vae" else f", or {key} = false to train without it"
    if (mmdit / "transformer").is_dir():
        if (mmdit / FOLDERS[key]).is_dir():
            return _part_in_folder(key, mmdit / FOLDERS[key])
        raise TensorFilesError(f"is not given, and {mmdit} has no folder {FOLDERS[key]}; give {key} = PATH{off}")
    inside = _stripped(key, network)
    if inside is None:
        raise TensorFilesError(f"is not given, and {mmdit} has none; give {key} = PATH{off}")
    return Part(key, inside, None, mmdit.parent)


def _stripped(key: str, tensors: TensorFiles) -> TensorFiles | None:
    """The part's tensors in a single file, without their prefix; None when it has none."""
    for prefix in PREFIXES[key]:
        inside = tensors.within(prefix)
        if len(inside):
            return inside
    return None


def _kind(key: str) -> str:
    return "a diffusers AutoencoderKL" if key == "vae" else "a transformers text encoder"


# --- what else a file may hold -----------------------------------------------------------------------------------------

_SIGNS = (
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


def what_it_is(names: Sequence[str]) -> str:
    """What tensors of these names are the weights of, as far as can be told."""
    for sign, what in _SIGNS:
        if any(sign in name for name in names):
            return what
    first = ", ".join(sorted(names)[:3])
    return f"something unknown (its first tensors: {first})" if names else "a file without tensors"
