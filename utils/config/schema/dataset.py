"""The dataset file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from utils.config.schema.base import Bool, Float, Int, Table


class ImageConfig(Table):
    """What may be said of all images of a dataset file, or in a `[[directory]]` of those in it."""

    resolutions: list[Annotated[Int, Field(ge=16)]] = Field(
        default_factory=list,
        description="Side in pixels of a square of the trained area; each image is used at every one. Must be given.",
    )
    enable_ar_bucket: Bool = Field(True, description="Keep images' shapes, sorted into buckets; else crop all square.")
    min_ar: Float = Field(0.5, gt=0, description="Narrowest width / height of a bucket.")
    max_ar: Float = Field(2.0, gt=0, description="Widest width / height of a bucket.")
    num_ar_buckets: Int = Field(7, ge=1, description="Buckets between the two, evenly spaced in the logarithm.")
    crop: Literal["center", "random"] = Field(
        "center",
        description="What is kept of the side that is too long for the bucket: the middle, or a place drawn for each "
        "image and resolution, the same in every run.",
    )
    upscale: Literal["allow", "never", "error"] = Field(
        "allow",
        description="Of an image smaller than its bucket: enlarge it, leave it out at that resolution, or refuse to start.",
    )
    min_pixels: Int = Field(0, ge=0, description="Images of less width x height are left out.")
    max_pixels: Int | None = Field(None, ge=1, description="Images of more width x height are left out.")
    num_repeats: Float = Field(
        1.0,
        gt=0,
        description="Times each image is shown in an epoch. Of 2.5, half of the images, others in each epoch, are shown "
        "three times.",
    )
    loss_weight: Float = Field(1.0, gt=0, description="Factor of these images' loss.")
    horizontal_flip: Bool = Field(False, description="Show each image flipped at half of its draws.")
    recursive: Bool = Field(False, description="Look into folders in the folder, too.")
    caption_per_line: Bool = Field(
        False, description="Each line of a .txt file is a caption of its own; one of them is drawn at each draw."
    )
    cache_shuffle_num: Int = Field(
        1, ge=1, description="Orders of a caption's tags that are encoded, the written one among them; each draw draws one."
    )
    cache_shuffle_delimiter: str = Field(", ", min_length=1, description="What stands between tags.")
    keep_tokens: Int = Field(0, ge=0, description="Tags at the beginning that stay where they are in every order.")
    on_bad_file: Literal["error", "skip"] = Field(
        "error", description="What an image or caption that cannot be read does: stop the run, or be left out of it."
    )


class DirectoryConfig(ImageConfig):
    """One `[[directory]]` of captioned images. Keys of the dataset file's top level hold here unless they are given."""

    path: Path = Field(
        description="Folder of images with captions; of .tar or .parquet files with them; or one such file. "
        "docs/data.md has every form."
    )
    mask_path: Path | None = Field(
        None,
        description="Folder of grey images of the same names: how much each place counts in the loss, white all, black "
        "nothing. Unset: all of it.",
    )
    control_path: Path | None = Field(
        None, description="Folder of images of the same names that a ControlNet is given; encoded with the images."
    )
    image_column: str | None = Field(
        None, min_length=1, description="Column of .parquet files that has images or their paths. Unset: by usual names."
    )
    caption_column: str | None = Field(
        None, min_length=1, description="Column of .parquet files that has captions. Unset: by usual names."
    )


class DatasetConfig(ImageConfig):
    """The dataset file. Its keys follow diffusion-pipe's."""

    directory: list[DirectoryConfig] = Field(min_length=1, description="Where the images are.")

    @model_validator(mode="after")
    def _hand_down(self) -> DatasetConfig:
        """Each directory with everything that holds for it."""
        given = {name: value for name, value in self if name in self.model_fields_set - {"directory"}}
        directories = [
            entry.model_copy(update={name: given[name] for name in given.keys() - entry.model_fields_set})
            for entry in self.directory
        ]
        if not all(entry.resolutions for entry in directories):
            raise ValueError("resolutions is missing; give it at the top, or in every [[directory]]")
        return self.model_copy(update={"directory": directories})
