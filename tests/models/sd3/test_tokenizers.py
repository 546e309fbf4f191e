"""The search order for tokenizers and the errors when there is none. No test contacts the hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from models.family import ModelFilesError
from models.sd3.family import SD3Family
from models.sd3.text_encoders import SD3TextEncoder
from tests.model_copies import linked_copy, settings_for
from tests.public_files import TOKENIZERS

ENCODERS = ("clip_l", "clip_g", "t5xxl")
FOLDERS = dict(zip(ENCODERS, ("text_encoder", "text_encoder_2", "text_encoder_3"), strict=True))
TOKENIZER_FOLDERS = dict(zip(ENCODERS, TOKENIZERS, strict=True))
HUB = {
    "clip_l": "openai/clip-vit-large-patch14",
    "clip_g": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "t5xxl": "google/t5-v1_1-xxl",
}
WANTED = {
    "clip_l": "vocab.json and merges.txt or tokenizer.json",
    "clip_g": "vocab.json and merges.txt or tokenizer.json",
    "t5xxl": "tokenizer.json or spiece.model",
}
FOX = {
    "clip_l": [49406, 320, 1125, 539, 320, 736, 3240, 49407],
    "clip_g": [49406, 320, 1125, 539, 320, 736, 3240, 49407],
    "t5xxl": [3, 9, 1202, 13, 3, 9, 1131, 1],
}
"""The first eight tokens of "a photo of a red fox"; truncated for T5."""


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a machine without network."""

    def refuse(*arguments: object, **named: object) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return linked_copy(tiny_model, tmp_path / "model")


def encoder_of(model: Path, name: str, **changes: Any) -> SD3TextEncoder:
    off = {other: False for other in ENCODERS if other != name}
    (encoder,) = SD3Family.from_files(settings_for(model, **{**off, **changes})).text_encoders
    return encoder


def error_of(model: Path, name: str, **changes: Any) -> str:
    with pytest.raises(ModelFilesError) as caught:
        encoder_of(model, name, **changes)
    ((key, text),) = caught.value.errors
    assert key == f"{name}_tokenizer"
    return text


def fox_tokens(encoder: SD3TextEncoder) -> list[int]:
    return encoder._token_ids(encoder._load_tokenizer(), "a photo of a red fox")


def link_files(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return folder


# --- search order------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_tokenizer_is_found_in_the_diffusers_folder_next_to_the_encoder(model: Path, name: str) -> None:
    encoder = encoder_of(model, name)
    assert encoder.tokenizer_folder == model / TOKENIZER_FOLDERS[name]
    assert fox_tokens(encoder) == FOX[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_tokenizer_is_found_next_to_a_bare_file(tiny_model: Path, tmp_path: Path, name: str) -> None:
    link_files(tiny_model / FOLDERS[name], tmp_path / "encoders")
    link_files(tiny_model / TOKENIZER_FOLDERS[name], tmp_path / "encoders" / TOKENIZER_FOLDERS[name])
    encoder = encoder_of(tiny_model, name, **{name: tmp_path / "encoders" / "model.safetensors"})
    assert encoder.tokenizer_folder == tmp_path / "encoders" / TOKENIZER_FOLDERS[name]
    assert fox_tokens(encoder) == FOX[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_folder_takes_precedence_over_the_folder_next_to_it(model: Path, name: str) -> None:
    link_files(model / TOKENIZER_FOLDERS[name], model / FOLDERS[name])
    encoder = encoder_of(model, name)
    assert encoder.tokenizer_folder == model / FOLDERS[name]
    assert fox_tokens(encoder) == FOX[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_configured_folder_takes_precedence(model: Path, tmp_path: Path, name: str) -> None:
    link_files(model / TOKENIZER_FOLDERS[name], model / FOLDERS[name])
    configured = link_files(model / TOKENIZER_FOLDERS[name], tmp_path / "configured")
    encoder = encoder_of(model, name, **{f"{name}_tokenizer": str(configured)})
    assert encoder.tokenizer_folder == configured
    assert {path.parent for path in encoder.files if path.name == "tokenizer_config.json"} == {configured}


def test_clip_tokenizer_next_to_a_bare_t5_file_is_not_used_for_t5(tiny_model: Path, tmp_path: Path) -> None:
    """Both kinds have the file name tokenizer.json."""
    link_files(tiny_model / "text_encoder_3", tmp_path)
    link_files(tiny_model / "tokenizer_3", tmp_path / "tokenizer_3")
    write_tokenizer_json(tiny_model, "clip_l", tmp_path)
    assert encoder_of(tiny_model, "t5xxl", t5xxl=tmp_path / "model.safetensors").tokenizer_folder.name == "tokenizer_3"


# --- sets of files -----------------------------------------------------------------------------------------------------


def write_tokenizer_json(model: Path, name: str, folder: Path) -> Path:
    """Writes the only file that transformers 5 saves."""
    from transformers import CLIPTokenizer, T5Tokenizer

    tokenizer = (T5Tokenizer if name == "t5xxl" else CLIPTokenizer).from_pretrained(model / TOKENIZER_FOLDERS[name])
    tokenizer.save_pretrained(folder / "saved")
    shutil.move(folder / "saved" / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "saved")
    return folder


@pytest.mark.parametrize("name", ["clip_l", "t5xxl"])
def test_tokenizer_json_alone_is_sufficient(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = write_tokenizer_json(tiny_model, name, tmp_path)
    assert fox_tokens(encoder_of(tiny_model, name, **{f"{name}_tokenizer": str(folder)})) == FOX[name]


@pytest.mark.parametrize(
    ("name", "files"), [("clip_l", ("vocab.json", "merges.txt")), ("t5xxl", ("spiece.model",))], ids=["clip_l", "t5xxl"]
)
def test_older_files_alone_are_sufficient(tiny_model: Path, tmp_path: Path, name: str, files: tuple[str, ...]) -> None:
    for file in files:
        (tmp_path / file).symlink_to(tiny_model / TOKENIZER_FOLDERS[name] / file)
    assert fox_tokens(encoder_of(tiny_model, name, **{f"{name}_tokenizer": str(tmp_path)})) == FOX[name]


# --- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Makes the hub return a folder; the returned list records the requested repositories."""

    def serve(folder: str) -> list[str]:
        requested: list[str] = []

        def download(repository: str, *, allow_patterns: list[str]) -> str:
            requested.append(repository)
            assert not any(pattern.endswith("safetensors") for pattern in allow_patterns)
            return str(tiny_model / folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return requested

    return serve


@pytest.mark.parametrize("name", ENCODERS)
def test_hub_is_the_last_resort(model: Path, hub: Callable[[str], list[str]], name: str) -> None:
    shutil.rmtree(model / TOKENIZER_FOLDERS[name])
    requested = hub(TOKENIZER_FOLDERS[name])
    encoder = encoder_of(model, name)
    assert requested == [HUB[name]]
    assert fox_tokens(encoder) == FOX[name]


def test_local_tokenizer_is_not_requested_from_the_hub(model: Path, hub: Callable[[str], list[str]]) -> None:
    requested = hub("tokenizer")
    encoder_of(model, "clip_l")
    assert requested == []


@pytest.mark.parametrize(("value", "folder"), [("owner/name", "tokenizer_3"), ("owner/name/tokenizer_3", ".")])
def test_configured_hub_name_may_include_a_folder(
    model: Path, hub: Callable[[str], list[str]], value: str, folder: str
) -> None:
    requested = hub(folder)
    encoder = encoder_of(model, "t5xxl", t5xxl_tokenizer=value)
    assert requested == ["owner/name"]
    assert encoder.tokenizer_folder.name == "tokenizer_3"
    assert fox_tokens(encoder) == FOX["t5xxl"]


def test_hub_repository_without_a_tokenizer_is_refused(model: Path, hub: Callable[[str], list[str]]) -> None:
    hub("vae")
    text = error_of(model, "clip_g", clip_g_tokenizer="owner/name")
    assert "owner/name" in text
    assert "has no vocab.json and merges.txt or tokenizer.json" in text


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_error_of_a_missing_tokenizer_lists_files_and_folder(model: Path, name: str) -> None:
    shutil.rmtree(model / TOKENIZER_FOLDERS[name])
    text = error_of(model, name)
    assert f"put {WANTED[name]} into {model / TOKENIZER_FOLDERS[name]}" in text
    assert f"{name}_tokenizer = " in text
    assert f"{HUB[name]}: it cannot be reached" in text


def test_error_of_huggingface_hub_without_network_is_handled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses huggingface_hub itself, offline, with an empty cache."""
    from huggingface_hub import _snapshot_download, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _snapshot_download.snapshot_download)
    shutil.rmtree(model / "tokenizer")
    assert "it cannot be reached" in error_of(model, "clip_l")


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_clip_tokenizer_with_one_of_two_files_is_not_accepted(model: Path, missing: str) -> None:
    (model / "tokenizer" / missing).unlink()
    assert f"put {WANTED['clip_l']} into {model / 'tokenizer'}" in error_of(model, "clip_l")


@pytest.mark.parametrize("name", ENCODERS)
def test_configured_folder_without_the_files_is_refused_without_further_search(model: Path, name: str) -> None:
    text = error_of(model, name, **{f"{name}_tokenizer": str(model / "vae")})
    assert str(model / "vae") in text
    assert f"({WANTED[name]})" in text


@pytest.mark.parametrize(("name", "other"), [("clip_l", "t5xxl"), ("t5xxl", "clip_l")])
def test_tokenizer_of_the_other_kind_is_refused(tiny_model: Path, tmp_path: Path, name: str, other: str) -> None:
    folder = write_tokenizer_json(tiny_model, other, tmp_path)
    text = error_of(tiny_model, name, **{f"{name}_tokenizer": str(folder)})
    assert f"the folder has no {'T5' if name == 't5xxl' else 'CLIP'} tokenizer" in text


def test_configured_hub_name_that_cannot_be_downloaded_is_named(model: Path) -> None:
    text = error_of(model, "t5xxl", t5xxl_tokenizer="owner/name")
    assert "'owner/name'" in text
    assert "no such folder" in text
    assert f"put {WANTED['t5xxl']} into a folder" in text


def test_first_line_of_the_error_of_the_hub_is_quoted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise HFValidationError("a name may not be like this\nand so on")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    text = error_of(model, "t5xxl", t5xxl_tokenizer="owner/name")
    assert "a name may not be like this" in text
    assert "and so on" not in text


@pytest.mark.parametrize("value", ["nonsense", "/no/such/folder/at/all", "http://somewhere/else"])
def test_value_that_is_neither_a_folder_nor_a_hub_name_is_refused(model: Path, value: str) -> None:
    text = error_of(model, "clip_l", clip_l_tokenizer=value)
    assert repr(value) in text
    assert f"neither a folder nor a hub name owner/name; set a folder with {WANTED['clip_l']}" in text


@pytest.mark.parametrize(
    "content", ["", "{}", "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0", "<html>" * 20]
)
@pytest.mark.parametrize(("key", "file"), [("clip_l", "vocab.json"), ("clip_l", "merges.txt"), ("t5xxl", "spiece.model")])
def test_tokenizer_file_with_invalid_content_is_not_accepted(
    tiny_model: Path, tmp_path: Path, key: str, file: str, content: str
) -> None:
    source = tiny_model / ("tokenizer" if key == "clip_l" else "tokenizer_3")
    folder = tmp_path / "configured"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt", "spiece.model"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    SD3Family.from_files(settings_for(tiny_model, **{f"{key}_tokenizer": str(folder)}))
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(ModelFilesError, match=f"{key}_tokenizer"):
        SD3Family.from_files(settings_for(tiny_model, **{f"{key}_tokenizer": str(folder)}))
