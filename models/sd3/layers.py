"""The MMDiT as a flat list of stage layers: each takes what the layer before returned, on whichever device that was.

What travels between stages is one float tensor with the three things a block needs, one after the other along the token
axis: text tokens, image tokens, conditioning row: (B, L + S + 1, D). One tensor and not a tuple, because DeepSpeed's
engine runs backward once per float tensor it receives. `pack` and `unpack` are the only code that knows this layout.

The layer classes subclass the network's parts, so parameter names stay native, and each adds only the unpacking.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.family import BlockLayer
from models.sd3.mmdit import Embedders, FinalLayer, JointBlock, MMDiTConfig

LAYER_LIST_VERSION = 1
"""The layer list is a file format: training checkpoints name layers by their place in it."""


def pack(tokens: Tensor, context: Tensor | None, conditioning: Tensor) -> Tensor:
    """tokens (B, S, D), context (B, L, D) or None, conditioning (B, D) -> (B, L + S + 1, D)."""
    parts = [] if context is None else [context]
    return torch.cat([*parts, tokens, conditioning[:, None]], dim=1)


def unpack(packed: Tensor, context_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L + S + 1, D) -> tokens (B, S, D), context (B, L, D), conditioning (B, D)."""
    context, tokens, conditioning = packed.split([context_length, packed.shape[1] - context_length - 1, 1], dim=1)
    return tokens.contiguous(), context.contiguous(), conditioning[:, 0]


class EmbedLayer(Embedders):
    """(latents (B, C, H, W), timestep (B,), context (B, L, context_dim), pooled (B, pooled_dim)) -> packed."""

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        return pack(*self.embed(*inputs))


class JointBlockLayer(JointBlock, BlockLayer):
    """packed -> packed; the last block's result has no text tokens, so it cannot be skipped."""

    def __init__(self, config: MMDiTConfig, index: int, context_length: int) -> None:
        super().__init__(config, index)
        self.context_length = context_length

    def forward(self, packed: Tensor) -> Tensor:
        if self.skipped:
            return packed
        tokens, context, conditioning = unpack(packed, self.context_length)
        return pack(*self.mix(tokens, context, conditioning), conditioning)


class OutputLayer(FinalLayer):
    """packed without text tokens -> patches of velocity (B, S, p*p*C)."""

    def forward(self, packed: Tensor) -> Tensor:
        tokens, _, conditioning = unpack(packed, 0)
        return self.project(tokens, conditioning)


def make_layer(config: MMDiTConfig, index: int, context_length: int) -> nn.Module:
    """Layer `index` of the list: embedders, the blocks, the output layer."""
    if index == 0:
        return EmbedLayer(config)
    if index <= config.depth:
        return JointBlockLayer(config, index - 1, context_length)
    return OutputLayer(config)


def layer_prefix(config: MMDiTConfig, index: int) -> str:
    """What turns a parameter name of layer `index` into the native name."""
    if index == 0:
        return ""
    return f"joint_blocks.{index - 1}." if index <= config.depth else "final_layer."


def num_layers(config: MMDiTConfig) -> int:
    return config.depth + 2


def layer_cost(config: MMDiTConfig, index: int) -> float:
    """Relative forward cost: multiply-adds of the linears an image token, with a third as many text tokens."""
    width = config.hidden_size
    if index == 0:
        return float(width * (config.context_dim + config.patch_size**2 * config.in_channels))
    if index > config.depth:
        return float(width * config.patch_size**2 * config.in_channels)
    dual = (index - 1) in config.dual_attention_layers
    last = index == config.depth
    return float(width**2 * (12 + (4 if dual else 0) + (1 if last else 4)))
