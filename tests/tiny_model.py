"""A complete SD3.5-medium-like model of a few megabytes in the public formats, images to train it on, and an experiment.

All weights are random with a fixed seed and none are zero, so every output depends on every weight and input. Run as a
script, this file writes all three into a folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toml
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

Shape = tuple[int, ...]

WIDTH = 128
DEPTH = 3
CONTEXT_DIM = 192
# The head width is 64 and norms have 32 groups as in the released models, because a bare file implies these values.
CLIP_L_WIDTH = 64
CLIP_G_WIDTH = 128
POOLED_DIM = CLIP_L_WIDTH + CLIP_G_WIDTH
POS_EMBED_MAX_SIZE = 16
LATENT_CHANNELS = 16
DUAL_ATTENTION_LAYERS = (0,)

IMAGE_SIZES = ((40, 40), (64, 32), (32, 64))
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
OUTLINES = ("circle", "square")


# --- the network -------------------------------------------------------------------------------------------------------


def native_shapes(
    *,
    depth: int,
    width: int,
    context_dim: int,
    pooled_dim: int,
    pos_embed_max_size: int,
    qk_norm: bool,
    dual_attention_layers: tuple[int, ...] = (),
) -> dict[str, Shape]:
    """Returns key -> shape of the public single file of a network, copied from the released files."""
    linears: dict[str, Shape] = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, pooled_dim),
        "y_embedder.mlp.2": (width, width),
        "context_embedder": (width, context_dim),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    shapes: dict[str, Shape] = {
        "pos_embed": (1, pos_embed_max_size**2, width),
        "x_embedder.proj.weight": (width, LATENT_CHANNELS, 2, 2),
        "x_embedder.proj.bias": (width,),
    }
    for index in range(depth):
        for stream in ("context_block", "x_block"):
            block = f"joint_blocks.{index}.{stream}"
            pre_only = stream == "context_block" and index == depth - 1
            dual = stream == "x_block" and index in dual_attention_layers
            for attention in ("attn", "attn2") if dual else ("attn",):
                linears[f"{block}.{attention}.qkv"] = (3 * width, width)
                if qk_norm:
                    shapes[f"{block}.{attention}.ln_q.weight"] = (64,)
                    shapes[f"{block}.{attention}.ln_k.weight"] = (64,)
                if not pre_only:
                    linears[f"{block}.{attention}.proj"] = (width, width)
            if not pre_only:
                linears[f"{block}.mlp.fc1"] = (4 * width, width)
                linears[f"{block}.mlp.fc2"] = (width, 4 * width)
            rows = 2 if pre_only else 9 if dual else 6
            linears[f"{block}.adaLN_modulation.1"] = (rows * width, width)
    for name, (out_features, in_features) in linears.items():
        shapes[f"{name}.weight"] = (out_features, in_features)
        shapes[f"{name}.bias"] = (out_features,)
    return shapes


def tiny_shapes() -> dict[str, Shape]:
    """Returns key -> shape of the tiny network."""
    return native_shapes(
        depth=DEPTH,
        width=WIDTH,
        context_dim=CONTEXT_DIM,
        pooled_dim=POOLED_DIM,
        pos_embed_max_size=POS_EMBED_MAX_SIZE,
        qk_norm=True,
        dual_attention_layers=DUAL_ATTENTION_LAYERS,
    )


def random_weights(shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, Tensor]:
    """Returns float32 tensors that roughly preserve the magnitude of activations; norms are near 1, biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        drawn = torch.randn(shape, generator=generator)
        if name == "pos_embed":
            weights[name] = 0.5 * drawn
        elif ".ln_" in name:
            weights[name] = 1 + 0.2 * drawn
        elif len(shape) == 1:
            weights[name] = 0.2 * drawn
        else:
            weights[name] = drawn / math.sqrt(math.prod(shape[1:]))
    return weights


# --- autoencoder, encoders, tokenizers ---------------------------------------------------------------------------------


def _write_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        sample_size=32,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    _perturb(autoencoder)
    autoencoder.save_pretrained(folder)


def _write_clip(folder: Path, width: int, activation: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act=activation,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    model = CLIPTextModelWithProjection(config)
    _perturb(model)
    if width == CLIP_L_WIDTH:  # as in the released model, where the pooled vector of CLIP-L is not projected
        torch.nn.init.eye_(model.text_projection.weight)
    model.save_pretrained(folder)


def _write_t5(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=CONTEXT_DIM,
        d_kv=64,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = T5EncoderModel(config)
    _perturb(model)
    model.save_pretrained(folder)


@torch.no_grad()
def _perturb(module: torch.nn.Module) -> None:
    """Perturbs norms and biases, and makes embeddings large enough to separate tokens."""
    for name, parameter in module.named_parameters():
        if "embed" in name or name.startswith("shared"):
            parameter.copy_(0.5 * torch.randn_like(parameter))
        elif parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))


def tokenizer_source() -> Path:
    """Returns the folder with SD3's three real tokenizers in the package diffsynth, which is not imported."""
    spec = importlib.util.find_spec("diffsynth")
    assert spec is not None, "pip install --no-deps diffsynth==1.1.9"
    assert spec.origin is not None
    return Path(spec.origin).parent / "tokenizer_configs" / "stable_diffusion_3"


def make_tiny_model(folder: Path) -> Path:
    """Writes mmdit.safetensors, vae/, text_encoder{,_2,_3}/ and tokenizer{,_2,_3}/ into the folder and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(tiny_shapes()), folder / "mmdit.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _write_vae(folder / "vae")
        _write_clip(folder / "text_encoder", CLIP_L_WIDTH, "quick_gelu")
        _write_clip(folder / "text_encoder_2", CLIP_G_WIDTH, "gelu")
        _write_t5(folder / "text_encoder_3")
    for number, name in enumerate(("tokenizer", "tokenizer_2", "tokenizer_3"), start=1):
        shutil.copytree(tokenizer_source() / f"tokenizer_{number}", folder / name, dirs_exist_ok=True)
    return folder


# --- images ------------------------------------------------------------------------------------------------------------


def write_image(folder: Path, index: int) -> Path:
    """Writes image number `index`, in one of three aspect ratios, and its caption; no two numbers are equal."""
    width, height = IMAGE_SIZES[index % len(IMAGE_SIZES)]
    colour, outline = COLOURS[index % len(COLOURS)], OUTLINES[index // len(COLOURS) % len(OUTLINES)]
    image = Image.new("RGB", (width, height), (200, 210, 220))
    draw = ImageDraw.Draw(image)
    box = (4 + index % 5, 6, width - 6, height - 4 - index % 7)
    draw.ellipse(box, fill=colour) if outline == "circle" else draw.rectangle(box, fill=colour)
    draw.point((0, 0), fill=(index % 256, index // 256, 0))
    path = folder / f"image_{index:03d}.png"
    image.save(path)
    path.with_suffix(".txt").write_text(f"a {colour} {outline}, number {index}\n", encoding="utf-8")
    return path


def make_tiny_dataset(folder: Path, num_images: int = 12) -> Path:
    """Writes that many captioned images into the folder and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_images):
        write_image(folder, index)
    return folder


# --- the experiment ----------------------------------------------------------------------------------------------------


def _experiment(folder: Path, model: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "output"),
        "dataset": str(folder / "dataset.toml"),
        "seed": 7,
        "max_steps": 4,
        "model": {
            "type": "sd3",
            "mmdit": str(model / "mmdit.safetensors"),
            "vae": str(model / "vae"),
            "clip_l": str(model / "text_encoder"),
            "clip_g": str(model / "text_encoder_2"),
            "t5xxl": str(model / "text_encoder_3"),
            "dtype": "float32",
            "clip_max_token_length": 8,
            "t5xxl_max_token_length": 8,
        },
        "pipeline": {"pipeline_stages": "auto", "micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
        "optimizer": {"type": "AdamW", "learning_rate": 1e-3},
        "save": {"dtype": "float32"},
        "monitoring": {"tensorboard": False, "report": False},
    }


def _dataset_file(dataset: Path) -> dict[str, Any]:
    return {
        "resolutions": [32],
        "enable_ar_bucket": True,
        "min_ar": 0.5,
        "max_ar": 2.0,
        "num_ar_buckets": 3,
        "directory": [{"path": str(dataset), "num_repeats": 1}],
    }


def merge(table: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Applies changes to a nested table: nested tables are merged, dotted keys address inner ones, None removes a key."""
    for dotted, value in changes.items():
        *outer, key = dotted.split(".")
        inner = table
        for name in outer:
            inner = inner.setdefault(name, {})
        if value is None:
            inner.pop(key, None)
        elif isinstance(value, Mapping):
            merge(inner.setdefault(key, {}), value)
        else:
            inner[key] = value


def write_experiment(folder: Path, model: Path, dataset: Path, /, **changes: Any) -> Path:
    """Writes experiment.toml and dataset.toml into the folder and returns the path of the former.

    changes: to the defaults, nested or dotted: `optimizer={"type": "SGD"}` or `**{"optimizer.type": "SGD"}`; changes to
    the dataset file in `dataset_file={...}`. None removes a key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    experiment, dataset_file = _experiment(folder, model), _dataset_file(dataset)
    merge(dataset_file, changes.pop("dataset_file", {}))
    merge(experiment, changes)
    (folder / "experiment.toml").write_text(toml.dumps(experiment), encoding="utf-8")
    (folder / "dataset.toml").write_text(toml.dumps(dataset_file), encoding="utf-8")
    return folder / "experiment.toml"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    print(write_experiment(target, make_tiny_model(target / "model"), make_tiny_dataset(target / "images")))
