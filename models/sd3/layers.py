"""The MMDiT as a list of pipeline layers: embedders, joint blocks, output layer.

Three streams travel between them: "text" tokens (B, L, D), "image" tokens (B, S, D) and the "conditioning" row (B, 1, D)
that modulates every block. The last block returns no text, because nothing after it reads any.

The layer classes subclass the network's parts, so parameter names stay native; each adds only the naming of its streams.
Shapes as in mmdit.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from models.family import BlockLayer, LayerCost
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
        """Moves everything but the position table, unless that has no values yet."""
        if self.pos_embed.is_meta:
            return super()._apply(fn, recurse)
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


def num_image_tokens(config: MMDiTConfig, shape: SampleShape) -> int:
    """Image tokens of one sample."""
    return (shape.height // config.patch_size) * (shape.width // config.patch_size)


def layer_outputs(config: MMDiTConfig, index: int) -> tuple[StreamSpec, ...]:
    """The streams that layer `index` returns, in the order in which they are packed; none for the output layer."""

    text = StreamSpec("text", lambda shape: shape.num_text_tokens)
    image = StreamSpec("image", partial(num_image_tokens, config))
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


def layer_cost(config: MMDiTConfig, index: int, shape: SampleShape) -> LayerCost:
    """What layer `index` computes for a micro-batch: its linear modules by stream, and its attention.

    The rows of the modulation (adaLN) and of the embedders of timestep and pooled text are one for each image.
    """
    image_tokens, text_tokens = num_image_tokens(config, shape), shape.num_text_tokens
    num_image, num_text = shape.batch * image_tokens, shape.batch * text_tokens
    if index == 0:
        rows = {"x_embedder.proj": num_image, "context_embedder": num_text}
        rows |= {f"{name}.mlp.{part}": shape.batch for name in ("t_embedder", "y_embedder") for part in (0, 2)}
        return LayerCost(rows, constant_inputs=frozenset(rows) - {"t_embedder.mlp.2", "y_embedder.mlp.2"})
    if index > config.depth:
        return LayerCost({"linear": num_image, "adaLN_modulation.1": shape.batch})
    is_last, is_dual = index == config.depth, index - 1 in config.dual_attention_layers
    rows = {f"x_block.{name}": num_image for name in _stream_modules(has_output=True, is_dual=is_dual)}
    rows |= {f"context_block.{name}": num_text for name in _stream_modules(has_output=not is_last, is_dual=False)}
    rows |= {f"{stream}.adaLN_modulation.1": shape.batch for stream in ("x_block", "context_block")}
    num_pairs = (image_tokens + text_tokens) ** 2 + (image_tokens**2 if is_dual else 0)
    return LayerCost(rows, attention_flops=4.0 * shape.batch * config.hidden_size * num_pairs)


def _stream_modules(*, has_output: bool, is_dual: bool) -> tuple[str, ...]:
    """The linear modules that process every token of a stream in a block."""
    output = ("attn.proj", "mlp.fc1", "mlp.fc2") if has_output else ()
    return ("attn.qkv", *output, *(("attn2.qkv", "attn2.proj") if is_dual else ()))
