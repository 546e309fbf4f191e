"""Imports everything a run needs, for the fork server of the ranks."""

from __future__ import annotations

import gc

import deepspeed.ops
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  what DeepSpeed imports with its first optimizer
import peft  # noqa: F401
import torch._dynamo  # noqa: F401  what torch imports with its first optimizer
from diffusers import AutoencoderKL  # noqa: F401
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer  # noqa: F401

import models.sd3.family  # noqa: F401
import train  # noqa: F401
from utils.report import plots

plots.as_svg("warm-up", lambda: plots.loss_figure([1], [1.0], [1.0]))  # matplotlib finds its fonts at the first plot
_ = deepspeed.ops.__compatible_ops__  # at the first look, DeepSpeed runs the compiler to find out what it could build
gc.freeze()  # a collection in a rank would write to, and so copy, every page that it shares with the fork server
