"""Makes the quickstart's training images, each with a caption in a text file of the same name:

    OUT/shapes/   drawn 64-pixel images of all captions but the held-out ones, equally many of each
    OUT/pink/     for the LoRA: shapes in a colour that OUT/shapes lacks; a fifth are ordinary ones, against forgetting
    OUT/photos/   photographs from scikit-image and scikit-learn, unchanged: many sizes, JPEG and PNG, RGB, grey, RGBA

From the drawn images a tiny model learns to follow captions within minutes. The photographs add the various sizes and modes
of real datasets. The same arguments always give the same files, and a second run does nothing.

    python -m examples.quickstart.make_dataset --out data/quickstart
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.quickstart import images
from examples.quickstart.folders import make_folder, package_folder
from examples.quickstart.images import Combination

SEED = 20240305
PINK_IMAGES = 200
REMINDER_IMAGES = 50  # ordinary images in OUT/pink

# These files are inside the wheels of both packages, so nothing is downloaded.
PHOTOGRAPHS = {
    ("skimage", "data/astronaut.png"): "a photograph of an astronaut",
    ("skimage", "data/brick.png"): "a photograph of a brick wall",
    ("skimage", "data/camera.png"): "a photograph of a man with a camera",
    ("skimage", "data/chelsea.png"): "a photograph of a cat",
    ("skimage", "data/coffee.png"): "a photograph of a cup of coffee",
    ("skimage", "data/coins.png"): "a photograph of old coins",
    ("skimage", "data/grass.png"): "a photograph of grass",
    ("skimage", "data/gravel.png"): "a photograph of gravel",
    ("skimage", "data/horse.png"): "a silhouette of a horse",
    ("skimage", "data/hubble_deep_field.jpg"): "a photograph of distant galaxies",
    ("skimage", "data/logo.png"): "a logo with a snake",
    ("skimage", "data/moon.png"): "a photograph of the moon",
    ("skimage", "data/motorcycle_left.png"): "a photograph of a motorcycle in a garage",
    ("skimage", "data/retina.jpg"): "a photograph of a retina",
    ("skimage", "data/rocket.jpg"): "a photograph of a rocket",
    ("sklearn", "datasets/images/china.jpg"): "a photograph of a temple in china",
    ("sklearn", "datasets/images/flower.jpg"): "a photograph of a flower",
}


def photographs() -> list[tuple[Path, str]]:
    """Returns (file, caption) of each photograph, in a fixed order."""
    return [(package_folder(package) / path, caption) for (package, path), caption in PHOTOGRAPHS.items()]


def write_drawings(folder: Path, combinations: Sequence[Combination], stream: int) -> None:
    """Draws one image per combination; image i depends on (SEED, stream, i) only."""
    folder.mkdir(exist_ok=True)
    for i, combination in enumerate(combinations):
        rng = np.random.default_rng([SEED, stream, i])
        images.draw(*combination, rng).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(combination.caption + "\n", encoding="utf-8")


def cycled(combinations: Sequence[Combination], count: int) -> list[Combination]:
    """Returns `count` combinations in numbers that differ by one at most."""
    return [combinations[i % len(combinations)] for i in range(count)]


def write_photographs(folder: Path) -> None:
    """Copies the photographs byte for byte, with their sizes and modes."""
    folder.mkdir()
    for source, caption in photographs():
        shutil.copyfile(source, folder / source.name)
        (folder / source.name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def write_dataset(folder: Path, num_images: int) -> None:
    ordinary = images.training_combinations()
    pink = cycled(images.combinations((images.EXTRA_COLOUR,)), PINK_IMAGES)
    shuffled = np.random.default_rng([SEED, 2]).permutation(len(ordinary))
    reminders = [ordinary[i] for i in shuffled[:REMINDER_IMAGES]]
    write_drawings(folder / "shapes", cycled(ordinary, num_images), stream=0)
    write_drawings(folder / "pink", pink + reminders, stream=1)
    write_photographs(folder / "photos")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must be empty or not exist")
    parser.add_argument("--images", type=int, default=1500, help="drawn images in OUT/shapes (default: 1500)")
    options = parser.parse_args()
    arguments = {"images": options.images, "seed": SEED, "max_offset": images.MAX_OFFSET}
    made = make_folder(options.out, arguments, lambda folder: write_dataset(folder, options.images))
    print(f"{options.out}: {'made' if made else 'already complete, nothing to do'}")


if __name__ == "__main__":
    main()
