"""The dataset file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from utils.config.schema.base import Bool, Float, Int, Table


class ImageConfig(Table):
    """Keys that apply to all images of a dataset file at its top level, or to those of one `[[directory]]`."""

    resolutions: list[Annotated[Int, Field(ge=16)]] = Field(
        default_factory=list,
        description="Training resolutions: sides in pixels of squares with the area of the trained images. Each image is "
        "used at every resolution. Required, at the top level or in every directory.",
    )
    enable_ar_bucket: Bool = Field(
        True,
        description="Sort images into buckets by aspect ratio (width / height). `false`: crop all images to squares.",
    )
    min_ar: Float = Field(0.5, gt=0, description="Smallest aspect ratio of a bucket.")
    max_ar: Float = Field(2.0, gt=0, description="Largest aspect ratio of a bucket.")
    num_ar_buckets: Int = Field(
        7,
        ge=1,
        description="Number of aspect ratios from `min_ar` to `max_ar`, evenly spaced on a logarithmic scale. The square is "
        "always among the buckets.",
    )
    crop: Literal["center", "random"] = Field(
        "center",
        description="Position of the crop along the side that is too long for the bucket: `center`, or `random`, which is "
        "drawn once per image and resolution and is the same in every run.",
    )
    upscale: Literal["allow", "never", "error"] = Field(
        "allow",
        description="Treatment of images that are smaller than their bucket. `allow`: enlarge them. `never`: skip them at "
        "that resolution. `error`: do not start.",
    )
    min_pixels: Int = Field(
        0, ge=0, description="Smallest number of pixels (width x height) of an image. Smaller images are skipped."
    )
    max_pixels: Int | None = Field(
        None,
        ge=1,
        description="Largest number of pixels (width x height) of an image. Larger images are skipped. Unset: no limit.",
    )
    num_repeats: Float = Field(
        1.0,
        gt=0,
        description="Number of draws of each image per epoch. With 2.5, every image is drawn twice, and half of the images, "
        "different ones in each epoch, a third time.",
    )
    loss_weight: Float = Field(1.0, gt=0, description="Factor of the loss of these images.")
    horizontal_flip: Bool = Field(
        False,
        description="Flip each image horizontally with a probability of 1/2 at each draw. Flipped images are encoded too, "
        "which doubles the disk space of their latents.",
    )
    recursive: Bool = Field(False, description="Include the folders inside the folder.")
    caption_per_line: Bool = Field(
        False,
        description="Treat each line of a .txt file as a separate caption, one of which is chosen at random at each draw.",
    )
    cache_shuffle_num: Int = Field(
        1,
        ge=1,
        description="Number of orders of a caption's tags that are encoded, including the original one. One of them is "
        "chosen at random at each draw. 1: only the original order.",
    )
    cache_shuffle_delimiter: str = Field(", ", min_length=1, description="Separator of tags in captions.")
    keep_tokens: Int = Field(0, ge=0, description="Number of first tags that keep their place in every order.")
    on_bad_file: Literal["error", "skip"] = Field(
        "error",
        description="Treatment of images and captions that cannot be used. `error`: do not start. `skip`: exclude them. "
        "Both list them in `bad_files.jsonl`.",
    )


class DirectoryConfig(ImageConfig):
    """One source of captioned images. Keys of the top level apply to it unless they are set here."""

    path: Path = Field(
        description="Folder with captioned images or with .tar or .parquet files, or a single such file. docs/data.md "
        "describes the formats."
    )
    mask_path: Path | None = Field(
        None,
        description="Folder of masks: greyscale images with the names of their images. The loss of each pixel is multiplied "
        "by value / 255: 1 for white, 0 for black. Unset: no masks.",
    )
    control_path: Path | None = Field(
        None,
        description="Folder of control images for a ControlNet, with the names of their images. They are encoded with the "
        "images. Unset: none.",
    )
    image_column: str | None = Field(
        None,
        min_length=1,
        description="Column of .parquet files with images or their paths. Unset: a column with a common name.",
    )
    caption_column: str | None = Field(
        None, min_length=1, description="Column of .parquet files with captions. Unset: a column with a common name."
    )


class DatasetConfig(ImageConfig):
    """The keys at the top level apply to all directories. Key names follow diffusion-pipe."""

    directory: list[DirectoryConfig] = Field(min_length=1, description="Sources of images.")

    @model_validator(mode="after")
    def _hand_down(self) -> DatasetConfig:
        """Copies keys of the top level to the directories that do not set them."""
        given = {name: value for name, value in self if name in self.model_fields_set - {"directory"}}
        directories = [
            entry.model_copy(update={name: given[name] for name in given.keys() - entry.model_fields_set})
            for entry in self.directory
        ]
        if not all(entry.resolutions for entry in directories):
            raise ValueError("resolutions is missing; set it at the top level, or in every [[directory]]")
        return self.model_copy(update={"directory": directories})
