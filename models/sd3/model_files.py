"""Opens and checks all files of a model that a [model] table names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.family import FileErrors, LoraFile, ModelFilesError
from models.sd3 import text_encoder_files, vae_files
from models.sd3.lora_files import open_lora_file
from models.sd3.network_shapes import adaptable_modules
from models.sd3.settings import SD3Settings
from models.sd3.sources import TEXT_ENCODERS, Component, find_components
from models.sd3.tokenizers import find_tokenizers
from models.sd3.weights import NetworkFiles
from models.tensor_files import TensorFiles

Merge = tuple[LoraFile, float]
"""(adapter merged into the network, strength)."""


@dataclass(frozen=True)
class ModelFiles:
    """The checked files of a model; headers have been read, weights have not."""

    settings: SD3Settings
    network: NetworkFiles
    """Merges the adapters of `merges` into the layers it loads."""
    vae: Component
    text_encoders: Mapping[str, Component]
    """The encoders that are on, by their key in the [model] table."""
    tokenizers: Mapping[str, Path]
    """Key of a text encoder -> folder of its tokenizer."""
    merges: Sequence[Merge]

    def sources(self) -> dict[str, Path]:
        """Returns key of the [model] table -> file or folder it is read from."""
        return {
            "mmdit": self.network.source,
            "vae": self.vae.tensors.source,
            **{name: component.tensors.source for name, component in self.text_encoders.items()},
            **{f"{name}_tokenizer": folder for name, folder in self.tokenizers.items()},
        }

    def notes(self) -> list[str]:
        """Returns remarks for the start banner: unusual latent scaling, merged adapters, replaced text encoders."""
        settings = self.settings
        notes = vae_files.scale_notes(self.vae)
        notes += [
            f"merged into the network: {file.path} ({len(file.shapes)} modules, strength {strength:g})"
            for file, strength in self.merges
        ]
        notes += [
            f"skipped {len(file.skipped_keys)} tensors for text encoders in {file.path}"
            for file, _ in self.merges
            if file.skipped_keys
        ]
        clips_off = settings.clip_l is False and settings.clip_g is False
        off = [name for name, is_off in (("CLIPs", clips_off), ("T5", settings.t5xxl is False)) if is_off]
        if off:
            how = "replaced by zeros" if settings.missing_encoders == "zeros" else "omitted"
            notes.append(f"tokens of the missing {' and '.join(off)} are {how} (model.missing_encoders)")
        return notes


def open_model_files(settings: SD3Settings) -> ModelFiles:
    """Opens and checks every file. Raises ModelFilesError with every error of every file."""
    tensors, components, errors = find_components(settings)
    encoders = {name: components[name] for name in TEXT_ENCODERS if name in components}
    network, component_errors = _check(tensors, components.get("vae"), encoders, settings)
    tokenizers, tokenizer_errors = find_tokenizers(settings, encoders)
    merges, merge_errors = _open_merges(settings, network)
    errors += component_errors + tokenizer_errors + merge_errors
    if errors or network is None:
        raise ModelFilesError(errors)
    for file, strength in merges:
        network.merge(file, strength)
    return ModelFiles(settings, network, components["vae"], encoders, tokenizers, merges)


def _check(
    tensors: TensorFiles | None, vae: Component | None, encoders: Mapping[str, Component], settings: SD3Settings
) -> tuple[NetworkFiles | None, FileErrors]:
    """Returns the network, if its files are valid, and the errors of every component that was found."""
    network, errors = None, []
    try:
        network = NetworkFiles(tensors) if tensors is not None else None
    except ModelFilesError as error:
        errors += error.errors
    config = network.config if network is not None else None
    if vae is not None:
        errors += vae_files.vae_errors(vae, config.in_channels if config is not None else None)
    errors += text_encoder_files.text_encoder_errors(encoders, settings, config)
    return network, errors


def _open_merges(settings: SD3Settings, network: NetworkFiles | None) -> tuple[list[Merge], FileErrors]:
    """Opens the adapters of `merge_adapters`; without a network they cannot be checked."""
    merges: list[Merge] = []
    errors: FileErrors = []
    if network is None:
        return merges, errors
    modules = adaptable_modules(network.config) if settings.merge_adapters else {}
    for index, merge in enumerate(settings.merge_adapters):
        try:
            file = open_lora_file(merge.path, modules, network.config.depth)
            merges.append((file, merge.strength))
        except ModelFilesError as error:
            errors += [(f"merge_adapters[{index}].path", text) for _, text in error.errors]
    return merges, errors
