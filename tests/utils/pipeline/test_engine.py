"""What the pipeline adds to a layer. The pipeline itself: tests/distributed."""

from __future__ import annotations

import torch
from torch import nn

from utils.pipeline.engine import add_anchor


def test_an_anchor_changes_nothing_and_is_run_backward_through() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(4, 4).to(dtype).requires_grad_(False)
        inputs = torch.randn(3, 4).to(dtype)
        expected = layer(inputs)
        anchor = add_anchor(layer)
        output = layer(inputs)
        assert output.dtype == dtype
        assert torch.equal(output, expected)
        output.sum().backward()
        assert anchor.grad is not None
        assert anchor.grad == 0


def test_an_anchor_is_the_only_parameter_that_is_trained() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    anchor = add_anchor(layer)
    assert [parameter for parameter in layer.parameters() if parameter.requires_grad] == [anchor]
