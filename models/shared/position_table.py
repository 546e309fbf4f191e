"""A square table of position embeddings, of which each image uses the centre.

Shapes: P patches per side of the table, D width.
"""

from __future__ import annotations

import math

from torch import Tensor


def crop_position_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the centre rows x columns of the table: (1, P*P, D) -> (1, rows*columns, D).

    Raises ValueError when the image has more patches per side than the table.
    """
    size = math.isqrt(table.shape[1])
    if rows > size or columns > size:
        raise ValueError(f"an image of {rows} x {columns} patches exceeds the position table of {size} x {size} patches")
    top, left = (size - rows) // 2, (size - columns) // 2
    grid = table.view(1, size, size, -1)[:, top : top + rows, left : left + columns]
    return grid.reshape(1, rows * columns, -1)
