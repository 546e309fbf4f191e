"""Keys of adapter files in the public formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.sd3.diffusers_names import diffusers_modules, swaps_halves
from models.sd3.variants import Shape

NATIVE_PREFIX = "lora_unet_"
DIFFUSERS_PREFIX = "transformer."
OTHER_NETWORKS = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder", "lora_prior_te")
"""Prefixes of keys for text encoders."""
KRONECKER = {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
"""Tensor name of ModuleAdapter -> suffix of its key."""

SUFFIXES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A": "down",
    "lora_B": "up",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    **{suffix: name for name, suffix in KRONECKER.items()},
}
"""Suffix of a key after the module's name -> tensor name of ModuleAdapter, or "alpha"."""


@dataclass(frozen=True)
class ModulePlace:
    """The module of the network that a module of a file belongs to."""

    module: str
    """Native name."""
    part: int
    """Index of the part."""
    num_parts: int
    """3 where the file has query, key and value of a fused qkv as separate modules, else 1."""
    swaps: bool
    """Whether the halves of the rows are swapped compared with the native order."""


def module_places(adaptable: Mapping[str, Shape], depth: int) -> dict[str, ModulePlace]:
    """Returns every name that a file may use for a module of the network -> the module it belongs to."""
    places: dict[str, ModulePlace] = {}
    for module in adaptable:
        native = ModulePlace(module, 0, 1, swaps=False)
        places[NATIVE_PREFIX + module.replace(".", "_")] = places["diffusion_model." + module] = native
        names = diffusers_modules(module)
        for index, name in enumerate(names):
            place = ModulePlace(module, index, len(names), swaps_halves(module, depth))
            for prefix in (DIFFUSERS_PREFIX, "base_model.model.", "base_model.model.transformer."):
                places[prefix + name] = place
            places["lora_transformer_" + name.replace(".", "_")] = place
    return places
