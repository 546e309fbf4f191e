"""Captions that are lists of tags: other orders of them."""

from __future__ import annotations

from dataclasses import dataclass

from utils import randomness


@dataclass(frozen=True, slots=True)
class TagShuffle:
    """Captions that are lists of tags, cached in several orders."""

    num_orders: int
    """Orders of each caption, the written one among them. With few tags, some are the same."""
    delimiter: str
    """What tags are joined by. They are split where it stands, with or without the white space around it."""
    keep_tokens: int
    """Tags at the beginning that stay where they are."""

    def order(self, caption: str, number: int) -> str:
        """The caption as written for number 0; for others, its tags in an order that (caption, number) alone decides.

        Empty tags and white space around tags are dropped then. With fewer than two tags to move it stays as written.
        """
        assert 0 <= number < self.num_orders
        # Tags are often joined by hand: "a,b, c" are three where the delimiter is ", ".
        parts = caption.split(self.delimiter.strip() or self.delimiter)
        tags = [tag for part in parts if (tag := part.strip())]
        kept, moved = tags[: self.keep_tokens], tags[self.keep_tokens :]
        if number == 0 or len(moved) < 2:
            return caption
        places = randomness.permutation(0, "tag order", caption, number, length=len(moved))
        return self.delimiter.join([*kept, *(moved[place] for place in places)])
