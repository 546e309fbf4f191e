"""Settings that libraries read from the environment when they are imported. Import this module before DeepSpeed."""

from __future__ import annotations

import os
import warnings

import torch

# Without an accelerator, DeepSpeed would probe for every kind of accelerator it supports.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Only errors are printed; progress bars are this program's.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed|transformers|diffusers|peft)\.")
