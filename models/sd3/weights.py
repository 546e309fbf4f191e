"""Reads the network from public files, one pipeline layer at a time.

Supported are the native single file, with or without `model.diffusion_model.` before its keys and with or without encoders
in the same file, and diffusers' folder. Opening a file reads its header only; building a layer reads that layer's tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.family import LoraFile, ModelFilesError
from models.sd3 import diffusers_names
from models.sd3.layers import layer_prefix
from models.sd3.network_shapes import empty_layer, network_shapes
from models.sd3.sources import describe_tensors
from models.sd3.variants import Shape, detect_config, variant_name
from models.shared.lora_update import merge_lora
from models.tensor_files import TensorFiles, shape_errors

CHECKPOINT_PREFIX = "model.diffusion_model."
_OTHER_COMPONENTS = ("first_stage_model.", "vae.", "text_encoders.", "model_ema.", "conditioner.")
"""Prefixes a single file may have besides those of the network; every other tensor must belong to the network."""


class NetworkFiles:
    """The checked files of a network: its config, and one layer at a time.

    Raises ModelFilesError with every error.
    """

    def __init__(self, tensors: TensorFiles) -> None:
        self.source = tensors.source
        self.paths = tensors.paths
        names = list(tensors.shapes)
        if any(name.startswith(CHECKPOINT_PREFIX) for name in names):
            tensors = tensors.within(CHECKPOINT_PREFIX)
        self._is_diffusers = any(name.startswith("transformer_blocks.") for name in tensors.shapes)
        if not self._is_diffusers:
            tensors = tensors.without(lambda name: name.startswith(_OTHER_COMPONENTS))
        self._tensors = tensors
        self._merges: list[tuple[LoraFile, float]] = []
        found = tensors.shapes
        try:
            if any(name.startswith("controlnet_blocks.") for name in found):  # its other tensors are those of a network
                raise ValueError("has controlnet_blocks.*")
            native = diffusers_names.native_shapes(found) if self._is_diffusers else found
            self.config = detect_config(native, self._name_in_file)
        except ValueError as error:
            kind = describe_tensors(names)
            raise ModelFilesError([("mmdit", f"{self.source} is {kind}, not a whole SD3 network: it {error}")]) from error
        errors = shape_errors(found, self._expected_shapes()) + tensors.storage_errors()
        if errors:
            file = f"{self.source}, by its shapes {variant_name(self.config)},"
            raise ModelFilesError([("mmdit", f"{file} {error}") for error in errors])

    def _name_in_file(self, name: str) -> str:
        """Returns the name of a native tensor, or of its first part, in the files."""
        return diffusers_names.diffusers_names(name)[0] if self._is_diffusers else name

    def _expected_shapes(self) -> dict[str, Shape]:
        """Returns name in the files -> shape."""
        expected = network_shapes(self.config)
        if not self._is_diffusers:
            return expected
        return {
            name_in_file: tuple(part.shape)
            for name, shape in expected.items()
            for name_in_file, part in diffusers_names.to_diffusers(
                name, torch.empty(shape, device="meta"), self.config.depth
            ).items()
        }

    def merge(self, file: LoraFile, strength: float) -> None:
        """Merges an adapter into every layer that is built from now on. 1 is the adapter as trained."""
        self._merges.append((file, strength))

    def load_layer(self, index: int, dtype: torch.dtype) -> nn.Module:
        """Builds pipeline layer `index` on the CPU, parameters in `dtype`, buffers in float32; reads only its tensors."""
        layer = empty_layer(self.config, index, dtype)
        prefix = layer_prefix(self.config, index)
        state = {name: self._read(prefix + name, tensor.dtype) for name, tensor in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)
        return layer

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns one tensor by its native name, with the adapters of its module merged in."""
        module = name.removesuffix(".weight")
        merges = [(file, strength) for file, strength in self._merges if name != module and module in file.shapes]
        tensor = self._read_stored(name, torch.float32 if merges else dtype)
        for file, strength in merges:
            tensor = merge_lora(tensor, file.read(module), strength)
        return tensor.to(dtype)

    def _read_stored(self, name: str, dtype: torch.dtype) -> Tensor:
        if not self._is_diffusers:
            return self._tensors.read_one(name, dtype)
        parts = [self._tensors.read_one(part, dtype) for part in diffusers_names.diffusers_names(name)]
        return diffusers_names.to_native(name, parts, self.config.depth)
