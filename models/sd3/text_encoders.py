"""CLIP-L, CLIP-G and T5-XXL as transformers' classes: captions to the sequences and pooled vectors the MMDiT reads.

From each CLIP, SD3 uses the hidden states before the last layer, without the final norm, and the pooled vector: the normed
output of the last layer at the end token, projected for CLIP-G but not for CLIP-L. From T5 it uses the normed output of
the last layer. No attention mask is used: padding tokens are attended to, so their id and number affect the encoding.
Source: Stability-AI/sd3.5, SD3 paper appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.family import LENGTH, EncodedItem, EncodeFunction, TextEncoder
from models.sd3.settings import DTYPES
from models.sd3.sources import Component
from models.sd3.text_encoder_files import encoder_config, encoder_shapes, encoder_tensors, pooled_width
from models.sd3.tokenizers import tokenizer_files


class SD3TextEncoder(TextEncoder):
    """Captions -> {"sequence": (tokens, width)} and, for CLIP, {"pooled": (width,)}, in the training precision.

    Captions are encoded one by one, so that a cached item does not depend on the rest of its batch.
    """

    def __init__(self, component: Component, tokenizer_folder: Path, num_tokens: int, dtype: str) -> None:
        self.name = component.key
        self.component = component
        self.tokenizer_folder = tokenizer_folder
        self.num_tokens = num_tokens
        self.dtype = DTYPES[dtype]
        self.files = (*component.files, *tokenizer_files(tokenizer_folder))
        self.settings = {"encoder": component.key, "num_tokens": num_tokens, "dtype": dtype}
        config = encoder_config(component)
        self.shapes = {"sequence": (num_tokens, int(config["d_model" if component.key == "t5xxl" else "hidden_size"]))}
        if component.key != "t5xxl":
            self.shapes["pooled"] = (pooled_width(component.key, config),)

    def load(self, device: torch.device) -> EncodeFunction:
        tokenizer = self._load_tokenizer()
        model = self._load_model().eval().requires_grad_(False).to(device)

        @torch.no_grad()
        def encode(captions: Sequence[str]) -> list[EncodedItem]:
            encoded = []
            for caption in captions:
                ids = torch.tensor([self._token_ids(tokenizer, caption)], device=device)
                tensors = _run_t5(model, ids) if self.name == "t5xxl" else _run_clip(model, ids, self.name == "clip_g")
                item = {key: value[0].to(self.dtype) for key, value in tensors.items()}
                encoded.append({**item, LENGTH: torch.tensor(self._length(tokenizer, caption), dtype=torch.int32)})
            return encoded

        return encode

    def _load_tokenizer(self) -> Any:
        from transformers import CLIPTokenizer, T5Tokenizer

        tokenizer_type: Any = T5Tokenizer if self.name == "t5xxl" else CLIPTokenizer
        return tokenizer_type.from_pretrained(self.tokenizer_folder, local_files_only=True)

    def _load_model(self) -> Any:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

        settings = encoder_config(self.component)
        state = dict(encoder_tensors(self.component).read(encoder_shapes(self.name, settings), self.dtype))
        model_type: Any = T5EncoderModel if self.name == "t5xxl" else CLIPTextModelWithProjection
        config: Any = (T5Config if self.name == "t5xxl" else CLIPTextConfig).from_dict(settings)
        if self.name == "clip_l":  # transformers requires it; SD3 does not use it, and many files do not have it
            state["text_projection.weight"] = torch.eye(config.projection_dim, config.hidden_size, dtype=self.dtype)
        return model_type.from_pretrained(None, config=config, state_dict=state, dtype=self.dtype)

    def _token_ids(self, tokenizer: Any, caption: str) -> list[int]:
        """Returns the token ids, truncated and padded to `num_tokens`.

        SD3 was trained with CLIP-L padded by its end token, CLIP-G and T5 by id 0; the tokenizer's own setting is ignored.
        """
        ids = tokenizer(caption, truncation=True, max_length=self.num_tokens)["input_ids"]
        pad = ids[-1] if self.name == "clip_l" else 0
        return list(ids) + [pad] * (self.num_tokens - len(ids))

    def _length(self, tokenizer: Any, caption: str) -> tuple[int, int]:
        """Returns (tokens of the whole caption, characters that remain after truncation)."""
        offsets = tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= self.num_tokens:
            return len(offsets), len(caption)
        # The last token is the end token, so num_tokens - 1 tokens of the caption remain. The offsets of T5's token for a
        # single space include the following character, which belongs to the next token; hence the minimum.
        first_cut = offsets[self.num_tokens - 1][0]
        return len(offsets), min(first_cut, max((end for _, end in offsets[: self.num_tokens - 1]), default=0))


def _run_clip(model: Any, ids: Tensor, projects: bool) -> dict[str, Tensor]:
    """ids (1, tokens) -> sequence (1, tokens, width), pooled (1, width)."""
    output = model.text_model(input_ids=ids, output_hidden_states=True)
    end = ids[0].argmax()  # the first end token, which has the largest id
    pooled = output.last_hidden_state[:, end]
    return {"sequence": output.hidden_states[-2], "pooled": model.text_projection(pooled) if projects else pooled}


def _run_t5(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """ids (1, tokens) -> sequence (1, tokens, width)."""
    return {"sequence": model(input_ids=ids).last_hidden_state}
