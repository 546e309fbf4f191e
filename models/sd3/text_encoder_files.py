"""Files of the text encoders: config and tensor names of transformers' folders and bare files, checks, and exports.

A bare file has no config next to its tensors: sizes follow from the tensor shapes, and other settings are those of the
released encoders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from models.family import FileErrors, FileTensor
from models.sd3.settings import SD3Settings
from models.sd3.sources import PREFIXES, Component, describe_tensors
from models.sd3.variants import MMDiTConfig, Shape
from models.tensor_files import TensorFiles, shape_errors

HEAD_WIDTH = 64
"""Width of an attention head in all three released encoders; a bare file does not contain it."""
_UNUSED = re.compile(r".*position_ids|logit_scale|spiece_model|(vision_model|visual_projection|decoder|lm_head)\..*")
"""Names of tensors that files contain besides the encoder: constants, a tokenizer, the other half of CLIP or T5."""


def encoder_tensors(component: Component) -> TensorFiles:
    """Returns the tensors of the encoder alone, under their names in the public files."""
    tensors = component.tensors.without(lambda name: _UNUSED.fullmatch(name) is not None)
    if component.key == "t5xxl":
        table, copy = "shared.weight", "encoder.embed_tokens.weight"
        if table in tensors:
            return tensors.without(lambda name: name == copy)
        return tensors.renamed(lambda name: table if name == copy else name)
    if "embeddings.token_embedding.weight" in tensors:  # CLIPTextModel in transformers 5
        tensors = tensors.renamed(lambda name: f"text_model.{name}")
    return tensors.without(lambda name: name == "text_projection.weight") if component.key == "clip_l" else tensors


def encoder_config(component: Component) -> dict[str, Any]:
    """Returns the config of transformers' class: config.json, or inferred from the tensor shapes of a bare file.

    Raises ValueError when a bare file lacks a defining tensor.
    """
    if component.config is not None:
        # The config of a CLIP with its image encoder contains that of the text encoder.
        settings: dict[str, Any] = component.config.get("text_config", component.config)
        return settings
    shapes = encoder_tensors(component).shapes
    return _t5_config(shapes) if component.key == "t5xxl" else _clip_config(component.key, shapes)


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
        raise ValueError(f"has width {width}, which is not a multiple of the head width, {HEAD_WIDTH}")
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


def encoder_shapes(key: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Returns tensor name in the public files -> shape of an encoder of this config."""
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
        shapes |= {f"{name}.{projection}.weight": (attention, width) for projection in ("q", "k", "v")}
        shapes |= {f"{name}.o.weight": (width, attention), f"encoder.block.{index}.layer.0.layer_norm.weight": (width,)}
        shapes |= {f"{mlp}.DenseReluDense.wi_{index}.weight": (inner, width) for index in (0, 1)}
        shapes |= {f"{mlp}.DenseReluDense.wo.weight": (width, inner), f"{mlp}.layer_norm.weight": (width,)}
    buckets = config.get("relative_attention_num_buckets", 32)
    shapes[f"{_T5_ATTENTION.format(0)}.relative_attention_bias.weight"] = (buckets, heads)
    return shapes


# --- checking and writing ----------------------------------------------------------------------------------------------


def text_encoder_errors(
    components: Mapping[str, Component], settings: SD3Settings, config: MMDiTConfig | None
) -> FileErrors:
    """Returns the errors of the encoders' files, and of their sizes if the network is known.

    Reads headers and config.json only.
    """
    errors: FileErrors = []
    configs: dict[str, dict[str, Any]] = {}
    for name, component in components.items():
        try:
            configs[name] = encoder_config(component)
            found = encoder_tensors(component)
            lines = shape_errors(found.shapes, encoder_shapes(name, configs[name]))
        except ValueError as error:
            kind = describe_tensors(list(component.tensors.shapes))
            errors.append((name, f"{component.tensors.source} is {kind}, not a whole {_KINDS[name]}: it {error}"))
            continue
        except KeyError as error:
            errors.append((name, f"{component.folder / 'config.json'} has no {error.args[0]}"))
            continue
        errors += [(name, f"{component.tensors.source} {line}") for line in lines + found.storage_errors()]
    if errors or config is None:
        return errors
    return _size_errors(settings, configs, config.context_dim, config.pooled_dim)


_KINDS = {"clip_l": "CLIP-L text encoder", "clip_g": "CLIP-G text encoder", "t5xxl": "T5 text encoder"}


def _size_errors(
    settings: SD3Settings, configs: Mapping[str, Mapping[str, Any]], context_dim: int, pooled_dim: int
) -> FileErrors:
    """Compares widths and lengths of the encoders with those of the network."""
    errors: FileErrors = []
    clips = {name: config for name, config in configs.items() if name != "t5xxl"}
    widths = {name: config["hidden_size"] for name, config in clips.items()}
    if len(widths) == 2 and widths["clip_l"] > widths["clip_g"]:
        errors.append(("clip_l", "is wider than clip_g: the two are swapped"))
    pooled = sum(pooled_width(name, config) for name, config in clips.items())
    if pooled != pooled_dim if len(clips) == 2 else pooled >= pooled_dim:
        names = " and ".join(clips)
        errors.append(
            (next(iter(clips)), f"pooled width of {names} is {pooled}, the network has {pooled_dim} for both CLIPs")
        )
    if sum(widths.values()) > context_dim:
        errors.append((next(iter(clips)), f"{' and '.join(clips)} are wider than the network's context, {context_dim}"))
    t5_width = configs["t5xxl"]["d_model"] if "t5xxl" in configs else context_dim
    if t5_width != context_dim:
        errors.append(("t5xxl", f"has width {t5_width}, the network's context has {context_dim}"))
    for name, config in clips.items():
        positions = config.get("max_position_embeddings", 77)
        if settings.clip_max_token_length > positions:
            errors.append(("clip_max_token_length", f"= {settings.clip_max_token_length}: {name} has {positions} positions"))
    return errors


def pooled_width(name: str, config: Mapping[str, Any]) -> int:
    return int(config["hidden_size"] if name == "clip_l" else config.get("projection_dim", config["hidden_size"]))


def single_file_errors(component: Component) -> list[str]:
    """Returns one line for each setting that a single file, which has no config, cannot represent."""
    if component.config is None:
        return []
    config = encoder_config(component)
    try:
        bare = encoder_config(Component(component.key, encoder_tensors(component), None, component.folder))
    except ValueError as error:
        return [f"{component.tensors.source} {error}; a single file cannot represent this"]
    not_inferred = ("num_attention_heads", "hidden_act", "feed_forward_proj")
    return [
        f"{component.tensors.source} has {key} {config[key]}; a single file always implies {bare[key]}"
        for key in not_inferred
        if key in config and config[key] != bare[key]
    ]


def file_tensors(component: Component) -> list[FileTensor]:
    """Returns the encoder's tensors as in a complete single file."""
    tensors = encoder_tensors(component)
    prefix = PREFIXES[component.key][0]
    return [
        FileTensor(prefix + name, tensors.shapes[name], partial(tensors.read_one, name))
        for name in encoder_shapes(component.key, encoder_config(component))
    ]
