"""Attention, modulation and MLP, compared with their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from models.shared.attention import Attention, attend
from models.shared.mlp import Mlp
from models.shared.modulation import modulate, normalise

WIDTH, HEAD_WIDTH, NUM_HEADS = 24, 8, 3


def random_module(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_()
    return module.double()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_its_formula(qk_norm: bool) -> None:
    attention = random_module(Attention(WIDTH, HEAD_WIDTH, qk_norm, has_proj=False))
    assert isinstance(attention, Attention)
    tokens = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (NUM_HEADS, HEAD_WIDTH)) for part in attention.qkv(tokens).split(WIDTH, dim=-1))
    if attention.ln_q is not None and attention.ln_k is not None:
        q, k = (
            x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            for x, norm in ((q, attention.ln_q), (k, attention.ln_k))
        )
    weights = torch.einsum("bsnk,btnk->bnst", q, k).div(math.sqrt(HEAD_WIDTH)).softmax(dim=-1)
    expected = torch.einsum("bnst,btnk->bsnk", weights, v).flatten(2)
    torch.testing.assert_close(attend(*attention.heads(attention.qkv(tokens))), expected)


def test_attention_without_projection_and_norms_has_neither_parameter() -> None:
    names = {name for name, _ in Attention(WIDTH, HEAD_WIDTH, qk_norm=False, has_proj=False).named_parameters()}
    assert names == {"qkv.weight", "qkv.bias"}
    names = {name for name, _ in Attention(WIDTH, HEAD_WIDTH, qk_norm=True, has_proj=True).named_parameters()}
    assert names == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "ln_q.weight", "ln_k.weight"}


def test_modulation_applies_shift_and_scale_per_sample_to_normalised_tokens() -> None:
    tokens = 3 + 2 * torch.randn(2, 5, WIDTH, dtype=torch.float64)
    shift, scale = torch.randn(2, WIDTH, dtype=torch.float64), torch.randn(2, WIDTH, dtype=torch.float64)
    mean, variance = tokens.mean(dim=-1, keepdim=True), tokens.var(dim=-1, unbiased=False, keepdim=True)
    normalised = (tokens - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(normalise(tokens), normalised)
    for index in range(2):
        expected = normalised[index] * (1 + scale[index]) + shift[index]
        torch.testing.assert_close(modulate(normalise(tokens), shift, scale)[index], expected)


def test_mlp_equals_its_formula() -> None:
    mlp = random_module(Mlp(WIDTH))
    assert isinstance(mlp, Mlp)
    tokens = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    hidden = tokens @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(mlp(tokens), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)
