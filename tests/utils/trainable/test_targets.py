"""Target modules with rank and alpha; errors of names, ranks, blocks and files with initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from models.family import LoraFile, ModelFamily
from utils.config.schema.adapter import AdapterConfig
from utils.trainable.initial_weights import initial_file_errors
from utils.trainable.targets import LoraTargets, Shape, choose_modules, parse_blocks

NUM_BLOCKS = 12
BLOCK = r"joint_blocks\.\d+\.(x_block|context_block)\."
GROUPS = {
    "attn": BLOCK + r"attn\.(qkv|proj)",
    "attn2": BLOCK + r"attn2\.(qkv|proj)",
    "mlp": BLOCK + r"mlp\.(fc1|fc2)",
    "adaLN_modulation": r".*adaLN_modulation\.1",
    "final_layer": r"final_layer\..*",
    "embedders": r".*embedder.*",
}


def modules() -> dict[str, Shape]:
    """The modules of an SD3.5-medium of width 64 with 12 blocks, the first two with dual attention."""
    found: dict[str, Shape] = {"x_embedder.proj": (64, 16, 2, 2), "context_embedder": (64, 32)}
    for block in range(NUM_BLOCKS):
        for stream in ("x_block", "context_block"):
            name = f"joint_blocks.{block}.{stream}"
            dual = stream == "x_block" and block < 2
            found.update({f"{name}.{attn}.qkv": (192, 64) for attn in (("attn", "attn2") if dual else ("attn",))})
            found.update({f"{name}.mlp.fc1": (256, 64), f"{name}.adaLN_modulation.1": (384, 64)})
    return {**found, "final_layer.linear": (48, 64)}


def network() -> ModelFamily:
    return cast(
        ModelFamily,
        SimpleNamespace(
            adaptable_modules=modules(),
            lora_target_groups=GROUPS,
            default_lora_targets=("attn", "mlp", "final_layer"),
            num_blocks=NUM_BLOCKS,
            block_of=lambda name: int(name.split(".")[1]) if name.startswith("joint_blocks.") else None,
        ),
    )


def choose(**settings: Any) -> tuple[LoraTargets, list[tuple[str, str]]]:
    return choose_modules(AdapterConfig(**{"type": "lora", **settings}), network())


def chosen(**settings: Any) -> dict[str, tuple[int, float]]:
    """Module -> rank and alpha."""
    chosen_targets, errors = choose(**settings)
    assert errors == []
    return {name: (module.rank, module.alpha) for name, module in chosen_targets.modules.items()}


def only_error(**settings: Any) -> str:
    (error,) = choose(**settings)[1]
    return ": ".join(error)


# --- names -------------------------------------------------------------------------------------------------------------


def test_default_targets_are_those_of_the_family() -> None:
    names = list(chosen())
    assert names == [name for name in modules() if any(part in name for part in (".attn.", ".mlp.", "final_layer"))]
    assert set(chosen().values()) == {(16, 16.0)}


def test_group_is_what_its_expression_matches() -> None:
    assert list(chosen(targets=["attn2"])) == ["joint_blocks.0.x_block.attn2.qkv", "joint_blocks.1.x_block.attn2.qkv"]


def test_expressions_match_whole_names_and_keep_the_network_s_order() -> None:
    names = chosen(targets=["final_layer.linear", r"joint_blocks\.1\.x_block\.attn\d?\.qkv"])
    assert list(names) == ["joint_blocks.1.x_block.attn.qkv", "joint_blocks.1.x_block.attn2.qkv", "final_layer.linear"]


def test_groups_and_expressions_mix() -> None:
    assert list(chosen(targets=["attn2", "context_embedder"]))[0] == "context_embedder"


def test_targets_have_the_kind_of_adapter() -> None:
    chosen_targets, _ = choose(dora=True, rank_stabilized=True)
    assert (chosen_targets.kind, chosen_targets.dora, chosen_targets.rank_stabilized) == ("lora", True, True)
    assert choose(type="lokr")[0].kind == "lokr"


# --- rank and alpha ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "entry", "expected"),
    [
        ({}, {}, (16, 16.0)),
        ({"rank": 8}, {}, (8, 8.0)),
        ({"rank": 8, "alpha": 2.0}, {}, (8, 2.0)),
        ({"rank": 8}, {"rank": 4}, (4, 4.0)),
        ({"rank": 8, "alpha": 2.0}, {"rank": 4}, (4, 2.0)),
        ({"rank": 8}, {"alpha": 1}, (8, 1.0)),
        ({"rank": 8, "alpha": 2.0}, {"rank": 4, "alpha": 3.0}, (4, 3.0)),
    ],
)
def test_rank_and_alpha_of_an_entry(settings: dict[str, Any], entry: dict[str, Any], expected: tuple[int, float]) -> None:
    assert set(chosen(targets=[{"pattern": "attn", **entry}], **settings).values()) == {expected}


def test_last_matching_entry_decides() -> None:
    special = {"pattern": r"joint_blocks\.3\.x_block.*qkv", "rank": 2}
    general_first = chosen(targets=["attn", special])
    assert general_first["joint_blocks.3.x_block.attn.qkv"] == (2, 2.0)
    assert general_first["joint_blocks.2.x_block.attn.qkv"] == (16, 16.0)
    special_first = chosen(targets=[special, "attn"])
    assert set(special_first.values()) == {(16, 16.0)}
    assert general_first.keys() == special_first.keys()


# --- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", {0}),
        ("0-11", set(range(12))),
        ("0-2,7", {0, 1, 2, 7}),
        (" 3 - 4 , 9 ", {3, 4, 9}),
        ("5-5,4-6,5", {4, 5, 6}),
    ],
)
def test_blocks_are_numbers_and_ranges(text: str, expected: set[int]) -> None:
    assert parse_blocks(text, NUM_BLOCKS) == expected


ALLOWED = "; blocks are 0 to 11, written such as 0-11,20"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a number is missing"),
        ("1,,2", "a number is missing"),
        ("1-", "'1-' is neither a number nor a range such as 0-11"),
        ("-1", "'-1' is neither a number nor a range such as 0-11"),
        ("all", "'all' is neither a number nor a range such as 0-11"),
        ("1.5", "'1.5' is neither a number nor a range such as 0-11"),
        ("1 2", "'1 2' is neither a number nor a range such as 0-11"),
        ("٣", "'٣' is neither a number nor a range such as 0-11"),
        ("12", "there is no block 12"),
        ("3-12", "there is no block 12 in '3-12'"),
        ("7-3", "'7-3' is a descending range; write 3-7"),
        (
            "7-3,x,99",
            "'7-3' is a descending range; write 3-7; 'x' is neither a number nor a range such as 0-11; there is no block 99",
        ),
    ],
)
def test_errors_of_blocks_say_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="blocks are 0 to 11") as caught:
        parse_blocks(text, NUM_BLOCKS)
    assert str(caught.value) == message + ALLOWED
    assert only_error(blocks=text) == f"adapter.blocks: = {text!r}: {message}{ALLOWED}"


def test_blocks_select_their_modules_and_those_outside_of_blocks() -> None:
    names = list(chosen(targets=["attn", "embedders", "final_layer"], blocks="1,4-5"))
    inside = [name for name in names if name.startswith("joint_blocks.")]
    assert {name.split(".")[1] for name in inside} == {"1", "4", "5"}
    assert [name for name in names if name not in inside] == ["x_embedder.proj", "context_embedder", "final_layer.linear"]


def test_entry_without_modules_in_the_blocks_is_an_error() -> None:
    assert only_error(targets=["attn", "attn2"], blocks="2-11") == (
        "adapter.targets[1]: = 'attn2': matches only modules of blocks 0 to 1, and none of these is among blocks = '2-11'"
    )


# --- near misses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("atn", "did you mean 'attn' or 'attn2'"),
        ("MLP", "did you mean 'mlp'"),
        ("adaln_modulations", "did you mean 'adaLN_modulation'"),
        ("final_layr", "did you mean 'final_layer'"),
        ("joint_blocks.40.x_block.attn.qkv", r"did you mean 'joint_blocks.\d+.x_block.attn.qkv' or "),
        (r"joint_blocks\.\d+\.x_blok\.attn\.qkv", r"did you mean 'joint_blocks.\d+.x_block.attn.qkv' or "),
        ("attn.qvk", "did you mean 'attn' or 'attn2' or '.*attn.qkv'?"),
        (
            "attn.qkv",
            "it is part of the name joint_blocks.0.x_block.attn.qkv, but must match the whole name: write '.*attn.qkv'",
        ),
        (
            "joint_blocks",
            "it is part of the name joint_blocks.0.x_block.attn.qkv, but must match the whole name: write 'joint_blocks.*'",
        ),
        (
            "x_block|nothing",
            "it is part of the name joint_blocks.0.x_block.attn.qkv, but must match the whole name: "
            "write '.*(x_block|nothing).*'",
        ),
        ("(?i)X_BLOCK", "it is part of the name joint_blocks.0.x_block.attn.qkv, but must match the whole name"),
        (
            "9999",
            "groups are attn, attn2, mlp, adaLN_modulation, final_layer, embedders; names are like x_embedder.proj, "
            "context_embedder, joint_blocks.0.x_block.attn.qkv and ",
        ),
        ("", "groups are attn, "),
    ],
)
def test_error_of_a_pattern_without_match_has_suggestions(pattern: str, text: str) -> None:
    error = only_error(targets=[pattern])
    assert error.startswith(f"adapter.targets[0]: = {pattern!r}: matches no module; ")
    assert text in error
    assert error.count("' or '") <= 2


@pytest.mark.parametrize(
    "pattern", ["atn", "attn.qvk", "mpl.fc1", "joint_blocks.40.x_block.attn.qkv", "embeders", "attn.qkv"]
)
def test_suggestions_match(pattern: str) -> None:
    proposals = [part for part in only_error(targets=[pattern]).split("'")[3::2] if part.strip() and " " not in part]
    assert proposals
    for proposal in proposals:
        assert chosen(targets=[proposal])


def test_group_without_modules_is_an_error() -> None:
    without = network()
    names = [name for name in modules() if "attn2" not in name]
    cast(Any, without).adaptable_modules = {name: modules()[name] for name in names}
    _, errors = choose_modules(AdapterConfig.model_validate({"type": "lora", "targets": ["attn", "attn2"]}), without)
    assert errors == [("adapter.targets[1]", "= 'attn2': this network has no module of that group")]


def test_invalid_expression_is_an_error_with_its_position() -> None:
    assert only_error(targets=["attn", "(x"]) == (
        "adapter.targets[1]: = '(x': is not a regular expression: missing ), unterminated subpattern at position 0"
    )


def test_all_errors_are_reported_at_once() -> None:
    _, errors = choose(targets=["(x", "nothing at all", {"pattern": "final_layer", "rank": 49}], blocks="99")
    assert [key for key, _ in errors] == [
        "adapter.blocks",
        "adapter.targets[0]",
        "adapter.targets[1]",
        "adapter.targets[2].rank",
    ]


# --- sizes -------------------------------------------------------------------------------------------------------------


def test_rank_above_the_limit_is_an_error_with_module_and_limit() -> None:
    """The input width of a convolution is that of its patch: 16 x 2 x 2."""
    advice = "; set a lower one for them in targets"
    assert (
        only_error(rank=50)
        == f"adapter.rank: = 50: is above the maximum of these modules: final_layer.linear (at most 48){advice}"
    )
    assert only_error(targets=["attn2", {"pattern": "x_embedder.proj", "rank": 65}]) == (
        f"adapter.targets[1].rank: = 65: is above the maximum of these modules: x_embedder.proj (at most 64){advice}"
    )
    assert chosen(rank=50, targets=["attn", "final_layer", {"pattern": "final_layer", "rank": 48}])
    assert chosen(targets=[{"pattern": "x_embedder.proj", "rank": 64}])


def test_lokr_allows_any_rank_and_no_convolution() -> None:
    assert chosen(type="lokr", rank=10_000)
    assert only_error(type="lokr", targets=["attn", "embedders"]) == (
        "adapter.targets[1]: = 'embedders': matches x_embedder.proj, a convolution, which LoKr does not support; "
        "use an expression that excludes it"
    )


# --- initial weights from a file ---------------------------------------------------------------------------------------


def low_rank(name: str, rank: int, *, magnitude: bool = False) -> dict[str, Shape]:
    shape = modules()[name]
    shapes: dict[str, Shape] = {"down": (rank, *shape[1:]), "up": (shape[0], rank, *[1] * (len(shape) - 2))}
    return {**shapes, "magnitude": shape[:1]} if magnitude else shapes


def file_errors(shapes: Mapping[str, Mapping[str, Shape]], **settings: Any) -> list[str]:
    def read(name: str) -> Any:
        raise AssertionError("headers are enough")

    config = AdapterConfig(**{"type": "lora", **settings})
    chosen_targets, errors = choose_modules(config, network())
    assert errors == []
    return initial_file_errors(LoraFile(Path("start.safetensors"), shapes, read, ()), chosen_targets, config, network())


QKV, FINAL = "joint_blocks.3.x_block.attn.qkv", "final_layer.linear"


def test_file_that_fits_has_no_errors() -> None:
    assert file_errors({QKV: low_rank(QKV, 16), FINAL: low_rank(FINAL, 4)}) == []
    assert file_errors({QKV: low_rank(QKV, 4)}, dora=True) == []
    assert file_errors({QKV: low_rank(QKV, 4, magnitude=True)}, dora=True) == []
    assert file_errors({QKV: {"w1": (12, 8), "w2_a": (16, 3), "w2_b": (3, 8)}}, type="lokr", rank=3) == []


@pytest.mark.parametrize(
    ("module", "settings", "advice"),
    [
        ("joint_blocks.0.x_block.attn2.qkv", {}, "add attn2 to targets"),
        ("joint_blocks.0.x_block.mlp.fc1", {"targets": ["attn"]}, "add mlp to targets"),
        (QKV, {"blocks": "0-2"}, "add their blocks to blocks = '0-2'"),
        (QKV, {"blocks": "0-2", "targets": ["mlp"]}, "add attn to targets and add their blocks to blocks = '0-2'"),
        ("joint_blocks.0.x_block.attn2.qkv", {"blocks": "0-2"}, "add attn2 to targets"),
    ],
)
def test_modules_of_the_file_that_are_not_targets_are_errors(module: str, settings: dict[str, Any], advice: str) -> None:
    (text,) = file_errors({module: low_rank(module, 4)}, **settings)
    assert text == f"has modules that are not among the targets: {module}; {advice}"


def test_long_lists_of_modules_are_shortened() -> None:
    names = [name for name in modules() if "adaLN" in name]
    (text,) = file_errors({name: low_rank(name, 4) for name in names})
    assert f"{', '.join(names[:3])} and {len(names) - 3} more; add adaLN_modulation to targets" in text


def test_file_of_higher_rank_is_an_error() -> None:
    shapes = {QKV: low_rank(QKV, 17), FINAL: low_rank(FINAL, 8)}
    targets = ["attn", {"pattern": "final_layer", "rank": 8}]
    assert file_errors(shapes, targets=targets) == [
        f"has a higher rank than configured: {QKV} (17, configured 16); raise rank"
    ]


LOKR = {"w1": (12, 8), "w2": (16, 8)}


@pytest.mark.parametrize(
    ("shapes", "settings", "text"),
    [
        (
            low_rank(QKV, 4, magnitude=True),
            {},
            'has a DoRA adapter for {}; to train it further, set type = "lora" and dora = true',
        ),
        (LOKR, {}, 'has a LoKr adapter for {}; to train it further, set type = "lokr"'),
        (LOKR, {"dora": True}, 'has a LoKr adapter for {}; to train it further, set type = "lokr"'),
        (low_rank(QKV, 4), {"type": "lokr"}, 'has a LoRA adapter for {}; to train it further, set type = "lora"'),
    ],
)
def test_file_of_another_kind_is_an_error(shapes: dict[str, Shape], settings: dict[str, Any], text: str) -> None:
    assert file_errors({QKV: shapes}, **settings) == [text.format(QKV)]


def test_kronecker_factors_must_be_of_equal_shape() -> None:
    (text,) = file_errors({QKV: LOKR}, type="lokr", rank=3)
    assert text == (
        f"has factors of other shapes than configured: {QKV} (w1 12 x 8, w2 16 x 8; "
        "configured w1 12 x 8, w2_a 16 x 3, w2_b 3 x 8); change rank"
    )
