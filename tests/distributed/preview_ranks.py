"""What each rank does for test_previews.py: runs train.py with text encoders that cannot be loaded."""

from __future__ import annotations

from typing import NoReturn

import torch

import train
from models.sd3.text_encoders import SD3TextEncoder


def _refuse(encoder: SD3TextEncoder, _device: torch.device) -> NoReturn:
    raise AssertionError(f"{encoder.name} was loaded")


def main() -> None:
    SD3TextEncoder.load = _refuse  # type: ignore[method-assign]
    train.main()
