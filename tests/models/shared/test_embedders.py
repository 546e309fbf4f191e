"""Blocks that several model families can use: timestep embedding, position table, patches."""

from __future__ import annotations

import pytest
import torch

from models.shared.embedders import PatchEmbedder, sinusoidal_embedding, unpatchify
from models.shared.position_table import crop_position_table


def test_sinusoids_are_computed_in_float32_for_any_timestep_dtype() -> None:
    whole = torch.tensor([0.0, 1.0, 256.0, 1000.0])  # exact in bfloat16
    assert torch.equal(sinusoidal_embedding(whole.to(torch.bfloat16), 256), sinusoidal_embedding(whole, 256))
    assert torch.equal(sinusoidal_embedding(torch.zeros(1), 256), torch.tensor([[1.0] * 128 + [0.0] * 128]))


def test_position_table_is_cropped_at_its_centre() -> None:
    table = torch.arange(36.0).view(1, 36, 1)  # 6 x 6, row * 6 + column
    crop = crop_position_table(table, rows=2, columns=4)
    assert crop.flatten().tolist() == [13, 14, 15, 16, 19, 20, 21, 22]


@pytest.mark.parametrize(("rows", "columns"), [(7, 2), (2, 7)])
def test_image_larger_than_the_position_table_is_refused(rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match="6 x 6"):
        crop_position_table(torch.zeros(1, 36, 8), rows, columns)


def test_unpatchify_puts_every_patch_in_its_place() -> None:
    image = torch.randn(2, 16, 6, 10, generator=torch.Generator().manual_seed(0))
    patches = image.view(2, 16, 3, 2, 5, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 15, 64)  # rows first; (p, q, C)
    assert torch.equal(unpatchify(patches, 6, 10, patch_size=2), image)


def test_unpatchify_inverts_patches_in_row_major_order() -> None:
    embedder = PatchEmbedder(patch_size=2, in_channels=3, width=12)
    identity = torch.eye(12).view(12, 2, 2, 3).permute(0, 3, 1, 2)  # patch -> token of layout (p, p, C)
    embedder.proj.weight.data, embedder.proj.bias.data = identity.contiguous(), torch.zeros(12)
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpatchify(embedder(latents), 4, 6, patch_size=2), latents)
