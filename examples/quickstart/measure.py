"""Measures how often the newest previews of a run show what their prompts describe.

Reads RUN_DIR/samples/step_NNNNNN/ (000.png, ... and prompts.json) and prints the percentages of right foreground colours,
backgrounds and shapes, separately for combinations in the training set and for those held out of it. Writes all previews
with their prompts into one image, and fails if too few are right. Prompts of another form ("a photograph of a cat") are in
the image but are not measured.

    python -m examples.quickstart.measure runs/quickstart --out grid.png --min-colours 0.95 --min-shapes 0.80
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.quickstart import images
from examples.quickstart.images import Combination

NUM_COLUMNS = 5
IMAGE_PIXELS = 160
MARGIN_PIXELS = 10
LABEL_PIXELS = 44
WRONG_COLOUR = (200, 0, 0)


@dataclass(frozen=True)
class Preview:
    """A prompt, its image, the requested combination (None: not measured) and the one detected in the image."""

    prompt: str
    image: Image.Image
    requested: Combination | None
    shown: Combination

    @property
    def wrong(self) -> bool:
        return self.requested is not None and self.requested != self.shown

    @property
    def held_out(self) -> bool:
        return self.requested in images.HELD_OUT


@dataclass(frozen=True)
class Score:
    """The number of previews, of `count`, with the right colours and shape."""

    count: int
    colour: int
    background: int
    shape: int


def newest_samples(run_dir: Path) -> Path:
    """Returns the samples folder of the highest step that has a prompts.json."""
    folders = {int(path.parent.name[5:]): path.parent for path in run_dir.glob("samples/step_*/prompts.json")}
    if not folders:
        raise SystemExit(f"{run_dir}: no samples/step_*/prompts.json; has the run generated previews yet?")
    return folders[max(folders)]


def load_previews(folder: Path) -> list[Preview]:
    previews = []
    for entry in json.loads((folder / "prompts.json").read_text(encoding="utf-8")):
        with Image.open(folder / entry["file"]) as opened:
            image = opened.convert("RGB")
        previews.append(Preview(entry["prompt"], image, images.parse(entry["prompt"]), images.read(image)))
    return previews


def score(previews: Sequence[Preview]) -> Score:
    """Counts the right parts of all measured previews."""
    pairs = [(preview.requested, preview.shown) for preview in previews if preview.requested is not None]
    return Score(
        count=len(pairs),
        colour=sum(requested.colour == shown.colour for requested, shown in pairs),
        background=sum(requested.background == shown.background for requested, shown in pairs),
        shape=sum(requested.shape == shown.shape for requested, shown in pairs),
    )


def table_row(name: str, result: Score) -> str:
    if not result.count:
        return f"{name:<10}{0:>8}{'-':>12}{'-':>12}{'-':>12}"
    numbers = (result.colour, result.background, result.shape)
    return f"{name:<10}{result.count:>8}" + "".join(f"{100 * number / result.count:>11.1f}%" for number in numbers)


def table(previews: Sequence[Preview]) -> str:
    groups = {
        "trained": [preview for preview in previews if not preview.held_out],
        "held out": [preview for preview in previews if preview.held_out],
        "all": list(previews),
    }
    header = f"{'':<10}{'number':>8}{'foreground':>12}{'background':>12}{'shape':>12}"
    return "\n".join([header, *(table_row(name, score(group)) for name, group in groups.items())])


def draw_cell(preview: Preview) -> Image.Image:
    """Returns one preview with its prompt below; a wrong one has a red frame and the detected combination."""
    width, height = IMAGE_PIXELS + 2 * MARGIN_PIXELS, IMAGE_PIXELS + 2 * MARGIN_PIXELS + LABEL_PIXELS
    cell = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(cell)
    scaled = preview.image.copy()
    factor = IMAGE_PIXELS / max(scaled.size)
    scaled = scaled.resize((round(scaled.width * factor), round(scaled.height * factor)), Image.Resampling.BICUBIC)
    left, top = (width - scaled.width) // 2, MARGIN_PIXELS + (IMAGE_PIXELS - scaled.height) // 2
    edge = 4 if preview.wrong else 1
    box = (left - edge, top - edge, left + scaled.width + edge - 1, top + scaled.height + edge - 1)
    pen.rectangle(box, fill=WRONG_COLOUR if preview.wrong else (160, 160, 160))
    cell.paste(scaled, (left, top))
    lines = textwrap.wrap(preview.prompt + (" (held out)" if preview.held_out else ""), 30)[:2]
    if preview.wrong:
        lines.append(f"wrong: {' '.join((preview.shown.colour, preview.shown.shape, 'on', preview.shown.background))}")
    for i, line in enumerate(lines):
        colour = WRONG_COLOUR if line.startswith("wrong: ") else (0, 0, 0)
        pen.text((MARGIN_PIXELS, MARGIN_PIXELS + IMAGE_PIXELS + 6 + 14 * i), line, colour, ImageFont.load_default(11))
    return cell


def draw_grid(previews: Sequence[Preview]) -> Image.Image:
    cells = [draw_cell(preview) for preview in previews]
    num_rows = -(-len(cells) // NUM_COLUMNS)
    width, height = cells[0].size
    grid = Image.new("RGB", (width * min(NUM_COLUMNS, len(cells)), height * num_rows), "white")
    for i, cell in enumerate(cells):
        grid.paste(cell, (i % NUM_COLUMNS * width, i // NUM_COLUMNS * height))
    return grid


def shortfalls(result: Score, min_colours: float, min_shapes: float) -> list[str]:
    """Returns one line for each part below its minimum."""
    required = {"foreground": (result.colour, min_colours), "background": (result.background, min_colours)}
    required["shape"] = (result.shape, min_shapes)
    return [
        f"{name} right in {correct} of {result.count} previews, at least {minimum:.0%} required"
        for name, (correct, minimum) in required.items()
        if correct < minimum * result.count
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run with previews")
    parser.add_argument("--out", type=Path, help="write all previews with their prompts into this PNG")
    parser.add_argument("--min-colours", type=float, default=0.0, help="fail below this fraction (default: 0)")
    parser.add_argument("--min-shapes", type=float, default=0.0, help="fail below this fraction (default: 0)")
    options = parser.parse_args()
    folder = newest_samples(options.run_dir)
    previews = load_previews(folder)
    result = score(previews)
    if options.out is not None and previews:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(previews).save(options.out)
    print(f"{folder}: {len(previews)} previews, {result.count} of them measured")
    if not result.count:
        raise SystemExit('no prompt has the form "a red circle on a blue background": nothing to measure')
    print(table(previews))
    errors = shortfalls(result, options.min_colours, options.min_shapes)
    if errors:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    main()
