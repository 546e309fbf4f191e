"""The table of examples: it returns the examples it was built from, also after mapping its file."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.utils.data.image_makers import noise, save
from tests.utils.data.scanning import Scan
from tests.utils.data.tables import DIRECTORY, ImageSpec, images_of, table_of
from utils.data.buckets import Bucket, crop_box
from utils.data.examples import Example, ExampleTable, empty_table
from utils.data.image_table import Directory, ImageTable, concatenate_images
from utils.data.sources.decoding import HASH_BYTES
from utils.data.sources.image_files import ImageFile
from utils.data.sources.image_rows import NO_ROW, Container, PairedImages, empty_paired_images
from utils.data.sources.tags import TagShuffle
from utils.files.columns import Texts
from utils.randomness import fraction

SQUARE, WIDE, LARGE = Bucket(32, 32), Bucket(48, 16), Bucket(64, 64)
NON_UTF8_NAME = os.fsdecode(b"caf\xe9/\xff.png")
SHUFFLE = TagShuffle(2, ", ", 1)
PLAIN = replace(DIRECTORY, path="/data/plain", resolutions=(32, 64))
SPECIAL = replace(
    DIRECTORY,
    key_prefix="eval/faces/1",
    path=f"/data/{os.fsdecode(bytes([0xFE]))}",
    repeats=2.5,
    loss_weight=0.5,
    may_flip=True,
    random_crop=True,
    skip_bad=True,
    shuffle=SHUFFLE,
)
SINGLE_ARCHIVE = replace(DIRECTORY, key_prefix="2", path="/data/zoo.tar")


def digest(number: int) -> bytes:
    return bytes([number]) * HASH_BYTES


def hashes(*numbers: int) -> np.ndarray:
    """Returns hashes (n, 16) uint8; number 0 is an unknown hash."""
    return np.frombuffer(b"".join(map(digest, numbers)), np.uint8).reshape(-1, HASH_BYTES).copy()


def mixed_table() -> ExampleTable:
    """Returns a table of image files and of images in .tar and .parquet files, with and without masks and control images."""
    images = ImageTable(
        directory=np.array([0, 0, 1, 1, 2], np.int32),
        names=Texts.of(["fox.png", "rows.parquet/owl.png", NON_UTF8_NAME, "a/zoo.tar/b/hen.png", "b/cow.png"]),
        sizes=np.array([(40, 40), (80, 64), (100, 16), (48, 16), (32, 32)], np.int32),
        file_ids=np.arange(5),
        hashes=hashes(1, 2, 0, 4, 5),
        captions=Texts.of(["a fox", "owl, night", "an owl", "x, y, z", "", "Kühe"]),
        first_caption=np.array([0, 1, 3, 4, 5, 6]),
        container=np.array([NO_ROW, 0, NO_ROW, 1, 2], np.int32),
        start=np.array([0, 7, 0, 512, 1024]),
        length=np.array([0, 0, 0, 99, 100]),
        mask=np.array([1, NO_ROW, 0, NO_ROW, NO_ROW], np.int32),
        control=np.array([NO_ROW, NO_ROW, 0, NO_ROW, NO_ROW], np.int32),
    )
    containers = [
        Container("/data/plain/rows.parquet", "rows.parquet", "image"),
        Container(f"{SPECIAL.path}/a/zoo.tar", "a/zoo.tar", ""),
        Container("/data/zoo.tar", "", ""),
    ]
    masks = PairedImages(Texts.of([f"/masks/{NON_UTF8_NAME}", "/masks/fox.jpg"]), hashes(21, 22))
    controls = PairedImages(Texts.of(["/control/c.png"]), hashes(0))
    rows = np.array([(0, 0, 0), (0, 1, 2), (1, 1, 2), (2, 0, 1), (3, 0, 1), (4, 0, 0)], np.int32)
    return ExampleTable([PLAIN, SPECIAL, SINGLE_ARCHIVE], containers, [SQUARE, WIDE, LARGE], images, masks, controls, rows)


def expected_examples() -> list[Example]:
    """Returns the expected examples of `mixed_table`."""
    fox = Example(
        "0/fox.png@32",
        ImageFile(Path("/data/plain/fox.png")),
        ("a fox",),
        crop_box(40, 40, SQUARE),
        mask=ImageFile(Path("/masks/fox.jpg")),
        image_hash=digest(1),
        mask_hash=digest(22),
    )
    crop_position = fraction(0, "crop", f"{NON_UTF8_NAME}@32")
    special = Example(
        f"eval/faces/1/{NON_UTF8_NAME}@32",
        ImageFile(Path(SPECIAL.path) / NON_UTF8_NAME),
        ("x, y, z",),
        crop_box(100, 16, WIDE, crop_position),
        repeats=2.5,
        mask=ImageFile(Path(f"/masks/{NON_UTF8_NAME}")),
        control=ImageFile(Path("/control/c.png")),
        loss_weight=0.5,
        may_flip=True,
        shuffle=SHUFFLE,
        mask_hash=digest(21),
    )
    return [
        fox,
        replace(fox, key="0/fox.png@64", box=crop_box(40, 40, LARGE)),
        Example(
            "0/rows.parquet/owl.png@64",
            ImageFile(Path("/data/plain/rows.parquet"), "image", 7, 0),
            ("owl, night", "an owl"),
            crop_box(80, 64, LARGE),
            image_hash=digest(2),
        ),
        special,
        replace(
            special,
            key="eval/faces/1/a/zoo.tar/b/hen.png@32",
            image=ImageFile(Path(SPECIAL.path) / "a/zoo.tar", "b/hen.png", 512, 99),
            captions=("",),
            box=crop_box(48, 16, WIDE),
            mask=None,
            control=None,
            image_hash=digest(4),
            mask_hash=b"",
        ),
        Example(
            "2/b/cow.png@32",
            ImageFile(Path("/data/zoo.tar"), "b/cow.png", 1024, 100),
            ("Kühe",),
            crop_box(32, 32, SQUARE),
            image_hash=digest(5),
        ),
    ]


def test_table_returns_the_expected_examples() -> None:
    table, examples = mixed_table(), expected_examples()
    assert list(table) == examples
    assert [table[index] for index in range(len(table))] == examples
    assert table[-1] == examples[-1]
    assert table[1:4] == examples[1:4]
    assert table[::-2] == examples[::-2]
    with pytest.raises(IndexError):
        table[len(examples)]


def test_accessors_agree_with_the_examples() -> None:
    table, examples = mixed_table(), expected_examples()
    assert [table.box(index) for index in range(len(table))] == [example.box for example in examples]
    assert table.repeats.tolist() == [example.repeats for example in examples]
    assert [table.directory_of(index).key_prefix for index in range(len(table))] == [
        "0",
        "0",
        "0",
        *["eval/faces/1"] * 2,
        "2",
    ]
    assert [table.name_of(image) for image in (0, 2, 4)] == ["0/fox.png", f"eval/faces/1/{NON_UTF8_NAME}", "2/b/cow.png"]
    assert table.num_images == 5
    assert table.bucket_counts() == {SQUARE: 2, WIDE: 2, LARGE: 2}
    assert list(table.bucket_counts()) == [SQUARE, WIDE, LARGE]


@pytest.mark.parametrize("chunk_rows", [2, 65536])
def test_cache_inputs_agree_with_the_examples(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    monkeypatch.setattr("utils.data.examples.CHUNK_ROWS", chunk_rows)
    random_crop = ImageSpec(size=(33, 90), directory=replace(DIRECTORY, random_crop=True))
    many = table_of([*images_of({SQUARE: 5, LARGE: 3}), random_crop])
    for table in (mixed_table(), mixed_table().where(np.arange(6) % 2 == 1), many, empty_table()):
        expected = [
            (example.box.key(), example.image_hash, example.mask_hash, example.control_hash, example.may_flip)
            for example in table
        ]
        assert [tuple(inputs) for inputs in table.cache_inputs()] == expected


def test_table_stores_columns_instead_of_examples() -> None:
    """An example takes about a hundred bytes, not the thousands of a Python object."""
    table = table_of(images_of({SQUARE: 1000}))
    columns = [column for column in vars(table.images).values() if isinstance(column, np.ndarray)]
    for texts in (table.images.names, table.images.captions):
        columns += [texts.offsets, texts.block[:]]
    assert table.rows.nbytes + sum(column.nbytes for column in columns) < 150 * len(table)
    assert table[3] == table[3]
    assert table[3] is not table[3]


def test_empty_table_has_no_examples() -> None:
    table = empty_table()
    assert len(table) == table.num_images == table.num_unhashed() == 0
    assert list(table) == list(table.unhashed()) == []
    assert table.bucket_counts() == {}
    assert table.repeats.tolist() == table.incomplete().tolist() == []


# --- captions ----------------------------------------------------------------------------------------------------------


def test_example_has_every_caption_in_every_tag_order() -> None:
    example = replace(expected_examples()[3], captions=("a, b, c, d", "e, f"))
    assert example.num_captions == 4
    assert [example.caption(number) for number in range(2)] == ["a, b, c, d", "e, f"]
    assert example.caption() == "a, b, c, d"
    shuffled = example.caption(2)
    assert shuffled.startswith("a, ")
    assert sorted(shuffled.split(", ")) == ["a", "b", "c", "d"]
    assert example.caption(3) == "e, f"


def test_without_tag_shuffling_an_example_has_its_written_captions() -> None:
    example = expected_examples()[2]
    assert example.num_captions == 2
    assert [example.caption(number) for number in range(2)] == ["owl, night", "an owl"]


# --- crops -------------------------------------------------------------------------------------------------------------


def crops(directory: Directory, count: int = 200) -> list[int]:
    """Returns the left edges of the crops of a directory's images, which are three times as wide as their bucket."""
    images = [ImageSpec(f"{number}.png", size=(96, 32), directory=directory) for number in range(count)]
    return [example.box.left for example in table_of(images)]


def test_random_crops_are_uniform_and_other_crops_centered() -> None:
    assert set(crops(DIRECTORY)) == {32}
    lefts = crops(replace(DIRECTORY, random_crop=True))
    assert min(lefts) < 4
    assert max(lefts) > 60
    assert abs(sum(lefts) / len(lefts) - 32) < 5


def test_random_crop_depends_only_on_name_and_resolution() -> None:
    """Moving a directory, in its dataset file or on disk, does not re-encode it."""
    lefts = crops(replace(DIRECTORY, random_crop=True))
    assert crops(replace(DIRECTORY, random_crop=True, key_prefix="7", path="/elsewhere", repeats=3)) == lefts
    both = table_of([ImageSpec(size=(96, 32), directory=replace(DIRECTORY, random_crop=True, resolutions=(32, 48)))])
    assert both[0].box != both[1].box


# --- selection ---------------------------------------------------------------------------------------------------------


def test_selection_has_the_chosen_examples_in_order() -> None:
    table, examples = mixed_table(), expected_examples()
    chosen = np.array([True, False, True, True, False, True])
    part = table.where(chosen)
    assert list(part) == [examples[index] for index in (0, 2, 3, 5)]
    assert part.num_images == 4
    assert part.bucket_counts() == {SQUARE: 2, WIDE: 1, LARGE: 1}
    assert list(part.where(np.array([False, True, False, True]))) == [examples[2], examples[5]]
    assert list(table) == examples, "the table itself is unchanged"


def test_selection_can_disable_flipping() -> None:
    table, examples = mixed_table(), expected_examples()
    part = table.where(np.ones(6, bool), never_flipped=True)
    assert list(part) == [replace(example, may_flip=False) for example in examples]
    assert table[3].may_flip


# --- hashes ------------------------------------------------------------------------------------------------------------


def test_file_without_hash_is_listed_once_and_its_hash_applies_to_all_examples() -> None:
    table = mixed_table()
    assert table.incomplete().tolist() == [False, False, False, True, False, False]
    assert table.num_unhashed() == 2
    entries = list(table.unhashed())
    assert [file for _, _, file in entries] == [expected_examples()[3].image, expected_examples()[3].control]
    for number, (column, row, _) in enumerate(entries, start=31):
        column[row] = np.frombuffer(digest(number), np.uint8)
    assert (table[3].image_hash, table[3].control_hash) == (digest(31), digest(32))
    assert not table.incomplete().any()
    assert table.num_unhashed() == 0


@pytest.mark.parametrize("part", ["image", "mask", "control"])
def test_example_is_incomplete_if_any_of_its_files_has_no_hash(part: str) -> None:
    at_two_resolutions = ImageSpec("c.png", directory=replace(DIRECTORY, resolutions=(32, 64)))
    table = table_of([ImageSpec("a.png"), ImageSpec("b.png", mask="b", control="b"), at_two_resolutions])
    for column in (table.images.hashes, table.masks.hashes, table.controls.hashes):
        column[:] = 1
    assert not table.incomplete().any()
    columns = {"image": table.images.hashes, "mask": table.masks.hashes, "control": table.controls.hashes}
    columns[part][-1] = 0
    assert table.incomplete().tolist() == ([False, False, True, True] if part == "image" else [False, True, False, False])
    assert table.num_unhashed() == 1


def test_unused_files_are_not_hashed() -> None:
    table = table_of([ImageSpec("a.png", mask="a"), ImageSpec("b.png", mask="b")])
    part = table.where(np.array([False, True]))
    assert [str(file) for _, _, file in part.unhashed()] == ["images/b.png", "b"]
    assert part.num_unhashed() == 2


# --- files -------------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], ExampleTable]] = {
    "mixed": mixed_table,
    "part": lambda: mixed_table().where(np.arange(6) > 1, never_flipped=True),
    "plain": lambda: table_of(images_of({SQUARE: 3, WIDE: 1})),
    "with empty captions": lambda: table_of([ImageSpec(captions=("",)), ImageSpec("b", captions=("", "b"))]),
    "empty": empty_table,
    "without examples": lambda: mixed_table().where(np.zeros(6, bool)),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_round_trips_through_its_file(tmp_path: Path, name: str) -> None:
    table = TABLES[name]()
    path = table.save_in(tmp_path / "datasets")
    opened = ExampleTable.open(path)
    assert list(opened) == list(table)
    assert opened.directories == table.directories
    assert opened.bucket_counts() == table.bucket_counts()
    assert opened.repeats.tolist() == table.repeats.tolist()
    assert opened.incomplete().tolist() == table.incomplete().tolist()
    assert list(opened.cache_inputs()) == list(table.cache_inputs())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_opened_table_locates_the_bytes_of_every_image(tmp_path: Path, scan_folders: Scan) -> None:
    """For files whose names are not UTF-8, and for archives that are a directory entry or are inside a directory."""
    folder, masks = tmp_path / os.fsdecode(b"\xff folder"), tmp_path / os.fsdecode(b"\xfe masks")
    for inner in (folder, masks, masks / "zoo.tar"):
        inner.mkdir()
    contents = []
    for number, name in enumerate((b"caf\xe9.png", b"fox.png")):
        image = save(noise(40 + 8 * number, 40), folder / os.fsdecode(name))
        image.with_suffix(".txt").write_text(f"caption {number}")
        contents.append(image.read_bytes())
        shutil.copy(image, masks)
    with tarfile.open(folder / "zoo.tar", "w") as tar:
        for member in ("fox.png", "fox.txt"):
            tar.add(folder / member, member)
    shutil.copy(folder / "fox.png", masks / "zoo.tar")
    shutil.copy(folder / "zoo.tar", tmp_path / "alone.tar")
    directories = [{"path": folder, "mask_path": masks, "recursive": True}, {"path": tmp_path / "alone.tar"}]
    dataset = scan_folders(directory=directories)
    assert dataset.bad_files == []
    opened = ExampleTable.open(dataset.examples.save_in(tmp_path))
    assert list(opened) == list(dataset.examples)
    contents_read = [(example.image.read(), example.captions, example.mask and example.mask.read()) for example in opened]
    cafe, fox = [(content, (f"caption {number}",), content) for number, content in enumerate(contents)]
    assert sorted(contents_read[:3]) == sorted([cafe, fox, fox])
    assert contents_read[3:] == [(contents[1], ("caption 1",), None)]
    assert [row for _, row, _ in opened.unhashed()] == [0, 1, 2, 3, 0, 1, 2]


def test_selection_from_an_opened_table_can_be_saved(tmp_path: Path) -> None:
    opened = ExampleTable.open(mixed_table().save_in(tmp_path))
    part = opened.where(np.arange(6) < 4)
    assert list(ExampleTable.open(part.save_in(tmp_path))) == expected_examples()[:4]
    assert list(opened) == expected_examples()


def test_setting_hashes_in_an_opened_table_does_not_change_its_file(tmp_path: Path) -> None:
    path = mixed_table().save_in(tmp_path)
    opened = ExampleTable.open(path)
    opened.images.hashes[:] = 9
    assert list(ExampleTable.open(path)) == expected_examples()


def test_file_name_depends_on_all_contents(tmp_path: Path) -> None:
    changed = mixed_table()
    changed.images.hashes[4] = 1
    tables = [
        *(make() for make in TABLES.values()),
        changed,
        table_of([ImageSpec("ab", captions=("c",))]),
        table_of([ImageSpec("a", captions=("bc",))]),
        table_of([ImageSpec("a", captions=("bc",), directory=replace(DIRECTORY, repeats=1.5))]),
        table_of([ImageSpec("a", captions=("b", "c"))]),
    ]
    paths = [table.save_in(tmp_path) for table in tables]
    assert len(set(paths)) == len(tables)
    assert mixed_table().save_in(tmp_path) == paths[0]


def test_existing_file_is_not_written_again(tmp_path: Path) -> None:
    before = mixed_table().save_in(tmp_path).stat()
    after = mixed_table().save_in(tmp_path).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_damaged_file_is_written_again(tmp_path: Path) -> None:
    path = mixed_table().save_in(tmp_path)
    intact = path.read_bytes()
    for damaged in (b"", intact[:-1], intact[:-1] + bytes([intact[-1] ^ 1])):
        path.write_bytes(damaged)
        assert mixed_table().save_in(tmp_path) == path
        assert list(ExampleTable.open(path)) == list(mixed_table())


# --- concatenation -----------------------------------------------------------------------------------------------------


def test_unused_columns_are_dropped() -> None:
    plain = table_of([ImageSpec("a.png"), ImageSpec("b.png")]).images
    for column in (plain.container, plain.start, plain.length, plain.mask, plain.control):
        assert len(column) == 0
    masked = table_of([ImageSpec("a.png"), ImageSpec("b.png", mask="b")]).images
    assert masked.mask.tolist() == [NO_ROW, 0]
    assert len(masked.control) == 0


def test_parts_are_concatenated_by_rows() -> None:
    images = mixed_table().images
    joined = concatenate_images([images, images])
    assert len(joined) == 10
    assert list(joined.names) == 2 * list(images.names)
    assert list(joined.captions) == 2 * list(images.captions)
    assert joined.first_caption.tolist() == [0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert joined.mask.tolist() == 2 * images.mask.tolist()
    assert len(concatenate_images([])) == 0
    assert len(empty_paired_images().paths) == 0
