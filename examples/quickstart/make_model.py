"""Makes a small untrained model with SD3.5-medium's architecture, in the published file formats of SD3.5:

    OUT/mmdit.safetensors    the network, 5 million parameters, native key names, float32
    OUT/vae/                 the small autoencoder from `train_vae.py` (diffusers folder)
    OUT/text_encoder{,_2,_3}/  CLIP-L, CLIP-G and T5 (transformers folders): small, random, with a fixed seed
    OUT/tokenizer{,_2,_3}/   the tokenizers of SD3, copied from the package diffsynth

The text encoders are untrained, but they map each word to a distinct and constant vector, which is sufficient for a network
trained from scratch. The network is initialised as in the SD3 paper: every block is the identity (adaLN zero) and the output
is zero. Its position table has 8 x 8 positions with a distance of 1: a 64-pixel image has 4 x 4 patches, and embeddings with
SD3's distance of 1/4 (for 64 x 64 patches) would be too similar for the network to distinguish.

    python -m examples.quickstart.make_model --out data/quickstart-model
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from examples.quickstart.folders import make_folder, package_folder
from models.sd3.mmdit import MMDiT
from models.sd3.variants import MMDiTConfig

SEED = 20240305
VAE_FOLDER = Path(__file__).parent / "vae"
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
TOKENIZERS = {"tokenizer": "tokenizer_1", "tokenizer_2": "tokenizer_2", "tokenizer_3": "tokenizer_3"}
CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH = 32, 64, 128
TOKEN_STD, POSITION_STD = 1.0, 0.5
CONDITION_STD = 0.02  # of the weights of the embedders of the timestep and the pooled text

NETWORK = MMDiTConfig(
    patch_size=2,
    in_channels=16,
    depth=4,
    hidden_size=192,  # three heads of 64
    context_dim=T5_WIDTH,
    pooled_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
    pos_embed_max_size=8,
    qk_norm=True,
    dual_attention_layers=(0, 1),
)


def position_table(size: int, width: int) -> Tensor:
    """Returns (1, size * size, width): sines and cosines of column and row, which count 0, 1, 2, ... (a step of 1).

    The first half of the width is the column's, the second the row's; in each half the sines come first.
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = np.arange(size)[:, None] * frequencies  # (size, width / 4)
    one_axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (size, width / 2)
    columns = np.tile(one_axis, (size, 1))
    rows = np.repeat(one_axis, size, axis=0)
    return torch.from_numpy(np.concatenate([columns, rows], axis=1)).float()[None]


@torch.no_grad()
def new_network() -> MMDiT:
    """Returns the untrained network; the random numbers are torch's global ones."""
    network = MMDiT(NETWORK)
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
    for name, parameter in network.named_parameters():
        if name.endswith(".bias") or "adaLN_modulation" in name or name.startswith("final_layer."):
            nn.init.zeros_(parameter)
        elif name.startswith(("t_embedder.", "y_embedder.")):
            nn.init.normal_(parameter, std=CONDITION_STD)
    network.pos_embed.copy_(position_table(NETWORK.pos_embed_max_size, NETWORK.hidden_size))
    return network


@torch.no_grad()
def new_clip(width: int, activation: str) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    encoder = CLIPTextModelWithProjection(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("token_embedding.weight"):
            nn.init.normal_(parameter, std=TOKEN_STD)
        elif name.endswith("position_embedding.weight"):
            nn.init.normal_(parameter, std=POSITION_STD)
    return encoder


def new_t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=32128,
        d_model=T5_WIDTH,
        d_kv=32,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    encoder = T5EncoderModel(config)
    nn.init.normal_(encoder.shared.weight, std=TOKEN_STD)
    return encoder


def write_text_encoders(folder: Path) -> None:
    clip_l = new_clip(CLIP_L_WIDTH, "quick_gelu")
    # SD3 uses CLIP-L's pooled output unprojected; with an identity projection, programs that project it give the same.
    nn.init.eye_(clip_l.text_projection.weight)
    clip_l.save_pretrained(folder / "text_encoder")
    new_clip(CLIP_G_WIDTH, "gelu").save_pretrained(folder / "text_encoder_2")
    new_t5().save_pretrained(folder / "text_encoder_3")


def write_model(folder: Path) -> None:
    torch.manual_seed(SEED)
    state = {name: tensor.contiguous() for name, tensor in new_network().state_dict().items()}
    save_file(state, folder / "mmdit.safetensors", metadata={"format": "pt"})
    write_text_encoders(folder)
    tokenizers = package_folder("diffsynth") / "tokenizer_configs" / "stable_diffusion_3"
    for name, source in TOKENIZERS.items():
        shutil.copytree(tokenizers / source, folder / name)
    (folder / "vae").mkdir()
    for name in VAE_FILES:
        shutil.copyfile(VAE_FOLDER / name, folder / "vae" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must be empty or not exist")
    options = parser.parse_args()
    made = make_folder(options.out, {"seed": SEED}, write_model)
    print(f"{options.out}: {'made' if made else 'already complete, nothing to do'}")


if __name__ == "__main__":
    main()
