"""The MMDiT of Stable Diffusion 3 and 3.5 as plain single-device code, with the parameter names of the public files.

Image and text tokens are two streams, each with its own weights, that share one attention per block. A conditioning vector
(timestep + pooled text) modulates every normalised input (adaLN): shift and scale before a sub-layer, a gate after it.
SD3.5 adds RMS norms of queries and keys. SD3.5-medium adds to its first blocks a second attention (`attn2`) over the image
tokens alone. Source: SD3 paper, arXiv 2403.03206, sect. 4, and the layout of the released checkpoints.

Shapes: B batch, C latent channels, H W latent height and width, p patch size, S image tokens (H/p * W/p), L text tokens,
D width, N heads, K head width (64 in every released network).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.sd3.variants import HEAD_WIDTH, MMDiTConfig
from models.shared.attention import Attention, attend
from models.shared.embedders import ConditionEmbedder, PatchEmbedder, sinusoidal_embedding, unpatchify
from models.shared.mlp import Mlp
from models.shared.modulation import modulate, normalise
from models.shared.position_table import crop_position_table
from models.shared.recompute import recomputed

TIMESTEP_FREQUENCIES = 256


class Embedders(nn.Module):
    """Everything before the first block: projects latents, text and conditioning to the width of the network."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbedder(config.patch_size, config.in_channels, width)
        self.t_embedder = ConditionEmbedder(TIMESTEP_FREQUENCIES, width)
        self.y_embedder = ConditionEmbedder(config.pooled_dim, width)
        self.context_embedder = nn.Linear(config.context_dim, width)
        self.register_buffer("pos_embed", torch.zeros(1, config.pos_embed_max_size**2, width))

    def embed(self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns image tokens (B, S, D), text tokens (B, L, D) and conditioning (B, D).

        latents (B, C, H, W), timestep (B,) in [0, 1000] float32, context (B, L, context_dim), pooled (B, pooled_dim).
        """
        rows, columns = latents.shape[-2] // self.config.patch_size, latents.shape[-1] // self.config.patch_size
        tokens = self.x_embedder(latents)  # (B, S, D)
        tokens = tokens + self.positions(rows, columns, tokens)
        conditioning = self.t_embedder(sinusoidal_embedding(timestep, TIMESTEP_FREQUENCIES)) + self.y_embedder(
            pooled
        )  # (B, D)
        return tokens, self.context_embedder(context), conditioning

    def positions(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Returns the position embeddings of an image of rows x columns patches: (1, S, D), dtype and device of `like`."""
        return crop_position_table(self.pos_embed, rows, columns).to(like.dtype).to(like.device)


class StreamBlock(nn.Module):
    """The weights of one stream in one block. With `pre_only` the stream provides q, k and v but is not updated."""

    recomputes_norms: bool = False
    """Whether the inputs of qkv, fc1 and fc2 are computed again in the backward pass: norms, modulation and GELU."""

    def __init__(self, config: MMDiTConfig, pre_only: bool = False, dual_attention: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = Attention(width, HEAD_WIDTH, config.qk_norm, has_proj=not pre_only)
        self.attn2 = Attention(width, HEAD_WIDTH, config.qk_norm, has_proj=True) if dual_attention else None
        self.mlp = None if pre_only else Mlp(width)
        num_vectors = 2 if pre_only else 9 if dual_attention else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, num_vectors * width))
        self.num_vectors = num_vectors

    def modulation(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """Returns shifts, scales and gates: (B, D) -> `num_vectors` of (B, D)."""
        return self.adaLN_modulation(conditioning).chunk(self.num_vectors, dim=-1)

    def heads(self, attention: Attention, tokens: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, k and v of the modulated tokens: (B, S, D), (B, D), (B, D) -> three of (B, N, S, K)."""
        return attention.heads(self._call(_modulated(attention.qkv), tokens, shift, scale))

    def feed_forward(self, mlp: Mlp, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Returns the output of the MLP for the modulated tokens: (B, S, D), (B, D), (B, D) -> (B, S, D)."""
        return self._call(mlp.finish, self._call(_modulated(mlp.fc1), tokens, shift, scale))

    def _call(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Calls a function that ends in a linear layer."""
        return (recomputed if self.recomputes_norms and torch.is_grad_enabled() else _plainly)(function, *tensors)

    def finish(self, tokens: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Applies what follows the joint attention: gated residual, second attention, gated MLP. (B, S, D) -> (B, S, D)."""
        assert self.attn.proj is not None
        assert self.mlp is not None
        gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation[2:6]
        result = tokens + gate_msa[:, None] * self.attn.proj(attended)
        if self.attn2 is not None and self.attn2.proj is not None:
            shift_msa2, scale_msa2, gate_msa2 = modulation[6:9]
            # The input of the second attention is the block's input, not the sum so far.
            second = attend(*self.heads(self.attn2, tokens, shift_msa2, scale_msa2))
            result = result + gate_msa2[:, None] * self.attn2.proj(second)
        return result + gate_mlp[:, None] * self.feed_forward(self.mlp, result, shift_mlp, scale_mlp)


def _modulated(linear: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(tokens, shift, scale) -> the layer's output for the normalised and modulated tokens."""
    return lambda tokens, shift, scale: linear(modulate(normalise(tokens), shift, scale))


def _plainly(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return function(*tensors)


class JointBlock(nn.Module):
    """Text and image stream with one joint attention over the tokens of both, text tokens first."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.context_block = StreamBlock(config, pre_only=index == config.depth - 1)
        self.x_block = StreamBlock(config, dual_attention=index in config.dual_attention_layers)

    def mix(self, tokens: Tensor, context: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the updated tokens and context; None for the context in the last block, which does not update it.

        tokens (B, S, D), context (B, L, D), conditioning (B, D).
        """
        for_image = self.x_block.modulation(conditioning)
        for_text = self.context_block.modulation(conditioning)
        streams = (
            self.context_block.heads(self.context_block.attn, context, *for_text[:2]),
            self.x_block.heads(self.x_block.attn, tokens, *for_image[:2]),
        )
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*streams, strict=True))
        length = context.shape[1]
        attended = attend(q, k, v)  # (B, L + S, D)
        new_tokens = self.x_block.finish(tokens, attended[:, length:], for_image)
        if self.context_block.mlp is None:
            return new_tokens, None
        return new_tokens, self.context_block.finish(context, attended[:, :length], for_text)


class FinalLayer(nn.Module):
    """Modulated norm and projection to velocity patches."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def project(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """tokens (B, S, D), conditioning (B, D) -> (B, S, p*p*C)."""
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=-1)
        return self.linear(modulate(normalise(tokens), shift, scale))


class MMDiT(Embedders):
    """The whole network on one device; its state dict has the keys of the native file. Training uses layers.py instead."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.joint_blocks = nn.ModuleList(JointBlock(config, index) for index in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Returns the velocity (B, C, H, W).

        latents (B, C, H, W), timestep (B,) = 1000 sigma in float32, context (B, L, context_dim) and pooled (B, pooled_dim)
        from the text encoders. H and W must be multiples of the patch size.
        """
        height, width = latents.shape[-2:]
        tokens, text, conditioning = self.embed(latents, timestep, context, pooled)
        for block in self.joint_blocks:
            assert isinstance(block, JointBlock)
            tokens, new_text = block.mix(tokens, text, conditioning)
            text = text if new_text is None else new_text
        return unpatchify(self.final_layer.project(tokens, conditioning), height, width, self.config.patch_size)
