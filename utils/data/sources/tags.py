"""Shuffled tag orders of captions that are lists of tags."""

from __future__ import annotations

from dataclasses import dataclass

from utils import randomness


@dataclass(frozen=True, slots=True)
class TagShuffle:
    """Settings for caching captions that are lists of tags in several orders."""

    num_orders: int
    """Number of orders of each caption, including the original one. With few tags, some orders coincide."""
    delimiter: str
    """The separator between tags. Captions are split at it, with or without its surrounding white space."""
    keep_tokens: int
    """Number of leading tags that keep their positions."""

    def order(self, caption: str, number: int) -> str:
        """Returns the caption unchanged for number 0, otherwise its tags in an order that depends only on (caption, number).

        Reordering drops empty tags and white space around tags. With fewer than two movable tags the caption is unchanged.
        """
        assert 0 <= number < self.num_orders
        # Hand-written captions are irregular: "a,b, c" has three tags if the delimiter is ", ".
        parts = caption.split(self.delimiter.strip() or self.delimiter)
        tags = [tag for part in parts if (tag := part.strip())]
        kept, moved = tags[: self.keep_tokens], tags[self.keep_tokens :]
        if number == 0 or len(moved) < 2:
            return caption
        positions = randomness.permutation(0, "tag order", caption, number, length=len(moved))
        return self.delimiter.join([*kept, *(moved[position] for position in positions)])
