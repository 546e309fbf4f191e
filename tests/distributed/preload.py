"""Imports everything a run needs, for the fork server of the ranks."""

from __future__ import annotations

import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  what DeepSpeed imports with its first optimizer
import peft  # noqa: F401
import torch._dynamo  # noqa: F401  what torch imports with its first optimizer
from diffusers import AutoencoderKL  # noqa: F401
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer  # noqa: F401

import models.sd3.family  # noqa: F401
import train  # noqa: F401
from utils.report import plots

plots.as_svg("warm-up", lambda: plots.loss_figure([1], [1.0], [1.0]))  # matplotlib finds its fonts at the first plot
