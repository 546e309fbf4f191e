"""CLIP-L, CLIP-G and T5-XXL over transformers: captions to the sequences and pooled vectors the MMDiT reads.

SD3 reads CLIP's last-but-one layer without the final norm, and of the last layer, normed, the row of the end token; that
row goes through a projection for CLIP-G and not for CLIP-L. T5 gives its normed last layer. No encoder sees a mask: the
padding takes part, so its id and its length are part of what a caption means. Source: Stability-AI/sd3.5, SD3 paper
appendix B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import EncodedItem, EncodeFunction, FrozenEncoder, read_pretrained_config
from models.sd3.mmdit import MMDiTConfig
from models.sd3.settings import DTYPES, SD3Settings

TOKENIZER_FOLDERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5xxl": "tokenizer_3"}
_TOKENIZER_FILES = {
    "clip_l": (("vocab.json", "merges.txt"), ("tokenizer.json",)),
    "clip_g": (("vocab.json", "merges.txt"), ("tokenizer.json",)),
    "t5xxl": (("tokenizer.json",), ("spiece.model",)),
}
"""The sets of files, any of which makes a tokenizer."""


def find_tokenizer(name: str, folder: Path) -> Path | None:
    """The folder with the encoder's tokenizer: its own, or the one beside it in diffusers' layout; None if neither."""
    for candidate in (folder, folder.parent / TOKENIZER_FOLDERS[name]):
        if any(all((candidate / file).is_file() for file in files) for files in _TOKENIZER_FILES[name]):
            return candidate
    return None


class SD3TextEncoder(FrozenEncoder):
    """Captions -> {"sequence": (tokens, width)} and, for CLIP, {"pooled": (width,)}, in the training precision.

    Captions are encoded one by one, so that what is cached does not depend on which others were encoded with it.
    """

    def __init__(self, name: str, folder: Path, tokenizer_folder: Path, num_tokens: int, dtype: str) -> None:
        self.name = name
        self.folder = folder
        self.tokenizer_folder = tokenizer_folder
        self.num_tokens = num_tokens
        self.dtype = DTYPES[dtype]
        tokenizer_files = sorted(p for p in tokenizer_folder.iterdir() if p.suffix in (".json", ".txt", ".model"))
        self.files = (folder / "config.json", *sorted(folder.glob("*.safetensors")), *tokenizer_files)
        self.settings = {"encoder": name, "num_tokens": num_tokens, "dtype": dtype}

    def load(self, device: torch.device) -> EncodeFunction:
        tokenizer = self._load_tokenizer()
        model = self._load_model().eval().requires_grad_(False).to(device)
        run = _run_t5 if self.name == "t5xxl" else _run_clip

        @torch.no_grad()
        def encode(captions: Sequence[str]) -> list[EncodedItem]:
            encoded = []
            for caption in captions:
                ids = torch.tensor([self._token_ids(tokenizer, caption)], device=device)
                tensors = run(model, ids)
                encoded.append({key: value[0].to(self.dtype).cpu() for key, value in tensors.items()})
            return encoded

        return encode

    def _load_tokenizer(self) -> Any:
        from transformers import CLIPTokenizer, T5Tokenizer

        tokenizer_type: Any = T5Tokenizer if self.name == "t5xxl" else CLIPTokenizer
        return tokenizer_type.from_pretrained(self.tokenizer_folder, local_files_only=True)

    def _load_model(self) -> Any:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

        model_type: Any = {"clip_l": CLIPTextModel, "clip_g": CLIPTextModelWithProjection, "t5xxl": T5EncoderModel}[
            self.name
        ]
        return model_type.from_pretrained(self.folder, local_files_only=True, dtype=self.dtype)

    def _token_ids(self, tokenizer: Any, caption: str) -> list[int]:
        """Token ids cut and padded to `num_tokens`. CLIP-L pads with its end token, CLIP-G and T5 with id 0, whatever
        the tokenizer's own files say: all three were trained so."""
        ids = tokenizer(caption, truncation=True, max_length=self.num_tokens)["input_ids"]
        pad = ids[-1] if self.name == "clip_l" else 0
        return list(ids) + [pad] * (self.num_tokens - len(ids))


def _run_clip(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """ids (1, tokens) -> sequence (1, tokens, width), pooled (1, width)."""
    output = model(input_ids=ids, output_hidden_states=True)
    end = ids[0].argmax()  # the first end token: no id is larger
    projection = getattr(model, "text_projection", None)
    pooled = output.last_hidden_state[:, end]
    return {
        "sequence": output.hidden_states[-2],
        "pooled": pooled if projection is None else projection(pooled),
    }


def _run_t5(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """ids (1, tokens) -> sequence (1, tokens, width)."""
    return {"sequence": model(input_ids=ids).last_hidden_state}


def join_text(text: Mapping[str, Tensor], context_dim: int) -> tuple[Tensor, Tensor]:
    """The three encoders' tensors as the network reads them.

    text: "clip_l.sequence" (B, tokens, width) and so on. Returns context (B, L, context_dim), CLIP's tokens (both encoders
    side by side, zeros up to the width) before T5's, and pooled (B, width of CLIP-L + width of CLIP-G).
    """
    clip = torch.cat([text["clip_l.sequence"], text["clip_g.sequence"]], dim=-1)
    clip = F.pad(clip, (0, context_dim - clip.shape[-1]))
    context = torch.cat([clip, text["t5xxl.sequence"]], dim=1)
    return context, torch.cat([text["clip_l.pooled"], text["clip_g.pooled"]], dim=-1)


def make_text_encoders(settings: SD3Settings) -> tuple[SD3TextEncoder, ...]:
    """CLIP-L, CLIP-G, T5 of checked settings."""
    lengths = {"clip_l": settings.clip_max_token_length, "clip_g": settings.clip_max_token_length}
    encoders = []
    for name in TOKENIZER_FOLDERS:
        folder = _folder(settings, name)
        tokenizer = find_tokenizer(name, folder)
        assert tokenizer is not None, "check_files comes first"
        num_tokens = lengths.get(name, settings.t5xxl_max_token_length)
        encoders.append(SD3TextEncoder(name, folder, tokenizer, num_tokens, settings.dtype))
    return tuple(encoders)


def _folder(settings: SD3Settings, name: str) -> Path:
    return {"clip_l": settings.clip_l, "clip_g": settings.clip_g, "t5xxl": settings.t5xxl}[name]


def check_files(settings: SD3Settings, config: MMDiTConfig | None) -> list[tuple[str, str]]:
    """What is wrong with the three folders and, where the network is known, how they fit it, as (key, message).

    Reads config.json only.
    """
    problems: list[tuple[str, str]] = []
    configs: dict[str, dict[str, Any]] = {}
    for name in TOKENIZER_FOLDERS:
        folder = _folder(settings, name)
        try:
            configs[name] = read_pretrained_config(folder, "a transformers text encoder")
        except ValueError as error:
            problems.append((name, str(error)))
            continue
        if find_tokenizer(name, folder) is None:
            wanted = " or ".join(" and ".join(files) for files in _TOKENIZER_FILES[name])
            place = folder.parent / TOKENIZER_FOLDERS[name]
            problems.append((name, f"no tokenizer: put {wanted} into {folder} or into {place}"))
    if problems or config is None:
        return problems
    return _fit_problems(settings, configs, config.context_dim, config.pooled_dim)


def _fit_problems(
    settings: SD3Settings, configs: Mapping[str, Mapping[str, Any]], context_dim: int, pooled_dim: int
) -> list[tuple[str, str]]:
    """Widths and lengths of the encoders against what the network takes."""
    widths = {name: configs[name].get("hidden_size", configs[name].get("d_model")) for name in configs}
    problems = [(name, "its config.json gives no width") for name, width in widths.items() if not isinstance(width, int)]
    if problems:
        return problems
    if widths["clip_l"] > widths["clip_g"]:
        problems.append(("clip_l", "is wider than clip_g: the two folders have changed places"))
    pooled = widths["clip_l"] + configs["clip_g"].get("projection_dim", widths["clip_g"])
    if pooled != pooled_dim:
        problems.append(("clip_l", f"pooled widths of CLIP-L and CLIP-G add up to {pooled}, the network takes {pooled_dim}"))
    if widths["clip_l"] + widths["clip_g"] > context_dim:
        problems.append(("clip_g", f"CLIP-L and CLIP-G together are wider than the network's context, {context_dim}"))
    if widths["t5xxl"] != context_dim:
        problems.append(("t5xxl", f"is {widths['t5xxl']} wide, the network's context is {context_dim}"))
    for name in ("clip_l", "clip_g"):
        positions = configs[name].get("max_position_embeddings", 77)
        if settings.clip_max_token_length > positions:
            problems.append(
                ("clip_max_token_length", f"= {settings.clip_max_token_length}: {name} has {positions} positions")
            )
    return problems
