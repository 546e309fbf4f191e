"""The MMDiT as a list of pipeline layers: embedders, joint blocks, output layer.

Three streams travel between them: "text" tokens (B, L, D), "image" tokens (B, S, D) and the "conditioning" row (B, 1, D)
that modulates every block. The last block returns no text, because nothing after it reads any.

The layer classes subclass the network's parts, so parameter names stay native; each adds only the naming of its streams.
Shapes as in mmdit.py.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from models.family import BlockLayer
from models.sd3.mmdit import Embedders, FinalLayer, JointBlock
from models.sd3.variants import MMDiTConfig
from models.streams import SampleShape, Streams, StreamSpec

LAYER_LIST_VERSION = 1
"""The pipeline layers are a file format: training checkpoints name layers by their index."""
INPUT_NAMES = ("noisy_latents", "timestep", "context", "pooled")
"""(B, C, H, W), (B,) in [0, 1000] float32, (B, L, context_dim), (B, pooled_dim)."""


class EmbedLayer(Embedders):
    """The inputs of INPUT_NAMES -> the streams text, image and conditioning.

    The position table (0.84 GiB in SD3.5-medium) stays on the CPU; the device has the part for the latest image size.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self._latest: tuple[tuple[int, int], Tensor] | None = None
        """(rows, columns) and their position embeddings."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves everything but the position table."""
        table = self._buffers.pop("pos_embed")
        try:
            return super()._apply(fn, recurse)
        finally:
            self._buffers["pos_embed"] = table

    def positions(self, rows: int, columns: int, like: Tensor) -> Tensor:
        if self._latest is None or self._latest[0] != (rows, columns) or self._latest[1].device != like.device:
            self._latest = (rows, columns), super().positions(rows, columns, like)
        return self._latest[1]

    def forward(self, inputs: Streams) -> Streams:
        tokens, context, conditioning = self.embed(*(inputs[name] for name in INPUT_NAMES))
        return {"text": context, "image": tokens, "conditioning": conditioning[:, None]}


class JointBlockLayer(JointBlock, BlockLayer):
    """The streams text, image and conditioning -> the same; the last block returns no text, so it cannot be skipped."""

    def recompute_norms(self, active: bool) -> None:
        self.x_block.recomputes_norms = self.context_block.recomputes_norms = active

    def forward(self, streams: Streams) -> Streams:
        if self.skipped:
            return streams
        conditioning = streams["conditioning"][:, 0]
        tokens, context = self.mix(streams["image"], streams["text"], conditioning)
        # The block passes on its own view of the conditioning row, not the stream it was given. Its gradient is then summed
        # as ((later blocks + this block's text) + this block's image) wherever the stages are cut, with the same rounding.
        outputs = {"image": tokens, "conditioning": conditioning[:, None]}
        return outputs if context is None else {"text": context, **outputs}


class OutputLayer(FinalLayer):
    """The streams image and conditioning -> velocity patches (B, S, p*p*C)."""

    def forward(self, streams: Streams) -> Tensor:
        return self.project(streams["image"], streams["conditioning"][:, 0])


def make_layer(config: MMDiTConfig, index: int) -> nn.Module:
    """Layer `index` of the list: embedders, the blocks, the output layer."""
    if index == 0:
        return EmbedLayer(config)
    if index <= config.depth:
        return JointBlockLayer(config, index - 1)
    return OutputLayer(config)


def layer_outputs(config: MMDiTConfig, index: int) -> tuple[StreamSpec, ...]:
    """The streams that layer `index` returns, in the order in which they are packed; none for the output layer."""

    def num_image_tokens(shape: SampleShape) -> int:
        return (shape.height // config.patch_size) * (shape.width // config.patch_size)

    text = StreamSpec("text", lambda shape: shape.num_text_tokens)
    image = StreamSpec("image", num_image_tokens)
    conditioning = StreamSpec("conditioning", lambda shape: 1, sources=("t_embedder.", "y_embedder."))
    if index < config.depth:
        return (text, image, conditioning)
    return (image, conditioning) if index == config.depth else ()


def layer_prefix(config: MMDiTConfig, index: int) -> str:
    """The prefix that turns a parameter name within layer `index` into the native name."""
    if index == 0:
        return ""
    return f"joint_blocks.{index - 1}." if index <= config.depth else "final_layer."


def num_layers(config: MMDiTConfig) -> int:
    """The number of pipeline layers."""
    return config.depth + 2


def layer_cost(config: MMDiTConfig, index: int) -> float:
    """Relative forward cost: multiply-adds of the linear layers for one image token and a third of a text token."""
    width = config.hidden_size
    if index == 0:
        return float(width * (config.context_dim + config.patch_size**2 * config.in_channels))
    if index > config.depth:
        return float(width * config.patch_size**2 * config.in_channels)
    dual = (index - 1) in config.dual_attention_layers
    last = index == config.depth
    return float(width**2 * (12 + (4 if dual else 0) + (1 if last else 4)))
