"""CLIP-L, CLIP-G and T5-XXL over transformers: captions to the sequences and pooled vectors the MMDiT reads.

SD3 reads CLIP's last-but-one layer without the final norm, and of the last layer, normed, the row of the end token; that
row goes through a projection for CLIP-G and not for CLIP-L. T5 gives its normed last layer. No encoder sees a mask: the
padding takes part, so its id and its length are part of what a caption means. Source: Stability-AI/sd3.5, SD3 paper
appendix B.

Read are transformers' folders and bare files with transformers' names, as the public files have them. A bare file has no
settings beside its tensors: the shape is told from those, and the rest is what the three released encoders have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.family import LENGTH, EncodedItem, EncodeFunction, FileTensor, TextEncoder
from models.sd3.mmdit import MMDiTConfig
from models.sd3.settings import DTYPES, SD3Settings
from models.sd3.sources import PREFIXES, Part, what_it_is
from models.sd3.tokenizers import tokenizer_files
from models.tensor_files import TensorFiles, shape_errors

HEAD_WIDTH = 64
"""Of all three encoders as released; a bare file cannot say."""
_NEVER_READ = re.compile(r".*position_ids|logit_scale|spiece_model|(vision_model|visual_projection|decoder|lm_head)\..*")
"""What files have beside the encoder: constants, a tokenizer, the other half of CLIP or T5."""
Shape = tuple[int, ...]


class SD3TextEncoder(TextEncoder):
    """Captions -> {"sequence": (tokens, width)} and, for CLIP, {"pooled": (width,)}, in the training precision.

    Captions are encoded one by one, so that what is cached does not depend on which others were encoded with it.
    """

    def __init__(self, part: Part, tokenizer_folder: Path, num_tokens: int, dtype: str) -> None:
        self.name = part.key
        self.part = part
        self.tokenizer_folder = tokenizer_folder
        self.num_tokens = num_tokens
        self.dtype = DTYPES[dtype]
        self.files = (*part.files, *tokenizer_files(tokenizer_folder))
        self.settings = {"encoder": part.key, "num_tokens": num_tokens, "dtype": dtype}
        config = encoder_config(part)
        self.shapes = {"sequence": (num_tokens, int(config["d_model" if part.key == "t5xxl" else "hidden_size"]))}
        if part.key != "t5xxl":
            self.shapes["pooled"] = (_pooled_width(part.key, config),)

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

        settings = encoder_config(self.part)
        state = dict(weights_of(self.part).read(expected_shapes(self.name, settings), self.dtype))
        model_type: Any = T5EncoderModel if self.name == "t5xxl" else CLIPTextModelWithProjection
        config: Any = (T5Config if self.name == "t5xxl" else CLIPTextConfig).from_dict(settings)
        if self.name == "clip_l":  # never used, and many files have none
            state["text_projection.weight"] = torch.eye(config.projection_dim, config.hidden_size, dtype=self.dtype)
        return model_type.from_pretrained(None, config=config, state_dict=state, dtype=self.dtype)

    def _token_ids(self, tokenizer: Any, caption: str) -> list[int]:
        """Token ids cut and padded to `num_tokens`. CLIP-L pads with its end token, CLIP-G and T5 with id 0, whatever
        the tokenizer's own files say: all three were trained so."""
        ids = tokenizer(caption, truncation=True, max_length=self.num_tokens)["input_ids"]
        pad = ids[-1] if self.name == "clip_l" else 0
        return list(ids) + [pad] * (self.num_tokens - len(ids))

    def _length(self, tokenizer: Any, caption: str) -> tuple[int, int]:
        """(Tokens of the whole caption, characters of it that are read)."""
        places = tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
        if len(places) <= self.num_tokens:
            return len(places), len(caption)
        # The last token read is the end token; before it comes as much of the caption as there is room for. T5's token of
        # a space alone claims the letter behind it, which is the next token's.
        first_unread = places[self.num_tokens - 1][0]
        return len(places), min(first_unread, max((end for _, end in places[: self.num_tokens - 1]), default=0))


def _run_clip(model: Any, ids: Tensor, projects: bool) -> dict[str, Tensor]:
    """ids (1, tokens) -> sequence (1, tokens, width), pooled (1, width)."""
    output = model.text_model(input_ids=ids, output_hidden_states=True)
    end = ids[0].argmax()  # the first end token: no id is larger
    pooled = output.last_hidden_state[:, end]
    return {"sequence": output.hidden_states[-2], "pooled": model.text_projection(pooled) if projects else pooled}


def _run_t5(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """ids (1, tokens) -> sequence (1, tokens, width)."""
    return {"sequence": model(input_ids=ids).last_hidden_state}


# --- what the network reads --------------------------------------------------------------------------------------------


def join_text(text: Mapping[str, Tensor], settings: SD3Settings, config: MMDiTConfig) -> tuple[Tensor, Tensor]:
    """The encoders' tensors as the network reads them.

    text: "clip_l.sequence" (B, tokens, width) and so on, of the encoders there are. Returns context (B, L, context_dim),
    CLIP's tokens (CLIP-L and CLIP-G side by side, zeros up to the width) before T5's, and pooled (B, pooled_dim), CLIP-L's
    before CLIP-G's. What is off is zeros, or its tokens are left out: `missing_encoders`.
    """
    some = next(iter(text.values()))
    clips = [text[f"{name}.sequence"] for name in ("clip_l", "clip_g") if f"{name}.sequence" in text]
    pooled = [text[f"{name}.pooled"] for name in ("clip_l", "clip_g") if f"{name}.pooled" in text]
    offset = 0
    if len(pooled) == 1:
        # Where CLIP-L would stand, CLIP-G leaves room: the two widths add up to the pooled width.
        offset = config.pooled_dim - pooled[0].shape[-1] if "clip_g.pooled" in text else 0
    clip = torch.cat(clips, dim=-1) if clips else some.new_zeros(some.shape[0], settings.clip_tokens, 0)
    clip = F.pad(clip, (offset, config.context_dim - offset - clip.shape[-1]))
    t5 = text.get("t5xxl.sequence", some.new_zeros(some.shape[0], settings.t5xxl_tokens, config.context_dim))
    both = torch.cat(pooled, dim=-1) if pooled else some.new_zeros(some.shape[0], 0)
    return torch.cat([clip, t5], dim=1), F.pad(both, (offset, config.pooled_dim - offset - both.shape[-1]))


def make_text_encoders(
    parts: Mapping[str, Part], tokenizers: Mapping[str, Path], settings: SD3Settings
) -> tuple[SD3TextEncoder, ...]:
    """The encoders that are not off."""
    lengths = {"t5xxl": settings.t5xxl_max_token_length}
    return tuple(
        SD3TextEncoder(part, tokenizers[name], lengths.get(name, settings.clip_max_token_length), settings.dtype)
        for name, part in parts.items()
    )


# --- bare files --------------------------------------------------------------------------------------------------------


def weights_of(part: Part) -> TensorFiles:
    """The encoder's tensors under the public files' names, and no others."""
    tensors = part.tensors.without(lambda name: _NEVER_READ.fullmatch(name) is not None)
    if part.key == "t5xxl":
        table, copy = "shared.weight", "encoder.embed_tokens.weight"
        if table in tensors:
            return tensors.without(lambda name: name == copy)
        return tensors.renamed(lambda name: table if name == copy else name)
    if "embeddings.token_embedding.weight" in tensors:  # a CLIPTextModel as transformers 5 has it
        tensors = tensors.renamed(lambda name: f"text_model.{name}")
    return tensors.without(lambda name: name == "text_projection.weight") if part.key == "clip_l" else tensors


def encoder_config(part: Part) -> dict[str, Any]:
    """The settings of transformers' class: config.json, or told from the shapes of a bare file.

    Raises ValueError when a bare file lacks a defining tensor.
    """
    if part.config is not None:
        settings: dict[str, Any] = part.config.get("text_config", part.config)  # whole CLIPs nest it
        return settings
    shapes = weights_of(part).shapes
    return _t5_config(shapes) if part.key == "t5xxl" else _clip_config(part.key, shapes)


def _shape_of(shapes: Mapping[str, Shape], name: str) -> Shape:
    if len(shapes.get(name, ())) != 2 or 0 in shapes[name]:
        raise ValueError(f"has no {name}")
    return shapes[name]


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    return 1 + max((int(m.group(1)) for name in shapes if (m := re.match(pattern, name))), default=-1)


def _clip_config(key: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    vocabulary, width = _shape_of(shapes, "text_model.embeddings.token_embedding.weight")
    positions, _ = _shape_of(shapes, "text_model.embeddings.position_embedding.weight")
    inner, _ = _shape_of(shapes, "text_model.encoder.layers.0.mlp.fc1.weight")
    if width % HEAD_WIDTH:
        raise ValueError(f"is {width} wide, no multiple of the head width, {HEAD_WIDTH}")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // HEAD_WIDTH,
        "projection_dim": _shape_of(shapes, "text_projection.weight")[0] if key == "clip_g" else width,
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu" if key == "clip_l" else "gelu",
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    }


def _t5_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    vocabulary, width = _shape_of(shapes, "shared.weight")
    buckets, heads = _shape_of(shapes, f"{_T5_ATTENTION.format(0)}.relative_attention_bias.weight")
    inner_attention, _ = _shape_of(shapes, f"{_T5_ATTENTION.format(0)}.q.weight")
    inner, _ = _shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner_attention // heads,
        "d_ff": inner,
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


_T5_ATTENTION = "encoder.block.{}.layer.0.SelfAttention"


def expected_shapes(key: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Tensor name -> shape of an encoder of these settings, in the public files' names."""
    return _t5_shapes(config) if key == "t5xxl" else _clip_shapes(key, config)


def _clip_shapes(key: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    linears = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    norms = ["text_model.final_layer_norm"]
    shapes: dict[str, Shape] = {
        "text_model.embeddings.token_embedding.weight": (config.get("vocab_size", 49408), width),
        "text_model.embeddings.position_embedding.weight": (config.get("max_position_embeddings", 77), width),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{index}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
    if key == "clip_g":
        shapes["text_projection.weight"] = (config.get("projection_dim", width), width)
    return shapes


def _t5_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    attention = heads * config["d_kv"]
    shapes: dict[str, Shape] = {"shared.weight": (config["vocab_size"], width), "encoder.final_layer_norm.weight": (width,)}
    for index in range(config["num_layers"]):
        name, mlp = _T5_ATTENTION.format(index), f"encoder.block.{index}.layer.1"
        shapes |= {f"{name}.{part}.weight": (attention, width) for part in ("q", "k", "v")}
        shapes |= {f"{name}.o.weight": (width, attention), f"encoder.block.{index}.layer.0.layer_norm.weight": (width,)}
        shapes |= {f"{mlp}.DenseReluDense.wi_{part}.weight": (inner, width) for part in (0, 1)}
        shapes |= {f"{mlp}.DenseReluDense.wo.weight": (width, inner), f"{mlp}.layer_norm.weight": (width,)}
    buckets = config.get("relative_attention_num_buckets", 32)
    shapes[f"{_T5_ATTENTION.format(0)}.relative_attention_bias.weight"] = (buckets, heads)
    return shapes


# --- checking and writing ----------------------------------------------------------------------------------------------


def check_parts(parts: Mapping[str, Part], settings: SD3Settings, config: MMDiTConfig | None) -> list[tuple[str, str]]:
    """What is wrong with the encoders' files and, where the network is known, how they fit it, as (key, message).

    Reads headers and config.json only.
    """
    errors: list[tuple[str, str]] = []
    configs: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        try:
            configs[name] = encoder_config(part)
            found = weights_of(part)
            misfits = shape_errors(found.shapes, expected_shapes(name, configs[name]))
        except ValueError as error:
            what = what_it_is(list(part.tensors.shapes))
            errors.append((name, f"{part.tensors.source} is {what}, not a whole {_KINDS[name]}: it {error}"))
            continue
        except KeyError as error:
            errors.append((name, f"{part.folder / 'config.json'} gives no {error.args[0]}"))
            continue
        errors += [(name, f"{part.tensors.source} {line}") for line in misfits + found.unreadable()]
    if errors or config is None:
        return errors
    return _fit_errors(settings, configs, config.context_dim, config.pooled_dim)


_KINDS = {"clip_l": "CLIP-L text encoder", "clip_g": "CLIP-G text encoder", "t5xxl": "T5 text encoder"}


def _fit_errors(
    settings: SD3Settings, configs: Mapping[str, Mapping[str, Any]], context_dim: int, pooled_dim: int
) -> list[tuple[str, str]]:
    """Widths and lengths of the encoders against what the network takes."""
    errors: list[tuple[str, str]] = []
    clips = {name: config for name, config in configs.items() if name != "t5xxl"}
    widths = {name: config["hidden_size"] for name, config in clips.items()}
    if len(widths) == 2 and widths["clip_l"] > widths["clip_g"]:
        errors.append(("clip_l", "is wider than clip_g: the two have changed places"))
    pooled = sum(_pooled_width(name, config) for name, config in clips.items())
    if pooled != pooled_dim if len(clips) == 2 else pooled >= pooled_dim:
        names = " and ".join(clips)
        errors.append((next(iter(clips)), f"pooled width of {names} is {pooled}, the network takes {pooled_dim} of both"))
    if sum(widths.values()) > context_dim:
        errors.append((next(iter(clips)), f"{' and '.join(clips)} are wider than the network's context, {context_dim}"))
    t5_width = configs["t5xxl"]["d_model"] if "t5xxl" in configs else context_dim
    if t5_width != context_dim:
        errors.append(("t5xxl", f"is {t5_width} wide, the network's context is {context_dim}"))
    for name, config in clips.items():
        positions = config.get("max_position_embeddings", 77)
        if settings.clip_max_token_length > positions:
            errors.append(("clip_max_token_length", f"= {settings.clip_max_token_length}: {name} has {positions} positions"))
    return errors


def _pooled_width(name: str, config: Mapping[str, Any]) -> int:
    return int(config["hidden_size"] if name == "clip_l" else config.get("projection_dim", config["hidden_size"]))


def file_errors(part: Part) -> list[str]:
    """Why a single file could not say how this encoder is built."""
    if part.config is None:
        return []
    config = encoder_config(part)
    try:
        bare = encoder_config(Part(part.key, weights_of(part), None, part.folder))
    except ValueError as error:
        return [f"{part.tensors.source} {error}; a single file cannot say how it is built then"]
    untold = ("num_attention_heads", "hidden_act", "feed_forward_proj")
    return [
        f"{part.tensors.source} has {key} {config[key]}; a single file cannot say so, it means {bare[key]}"
        for key in untold
        if key in config and config[key] != bare[key]
    ]


def file_tensors(part: Part) -> list[FileTensor]:
    """The encoder as a complete single file has it."""
    tensors = weights_of(part)
    prefix = PREFIXES[part.key][0]
    return [
        FileTensor(prefix + name, tensors.shapes[name], partial(tensors.read_one, name))
        for name in expected_shapes(part.key, encoder_config(part))
    ]
