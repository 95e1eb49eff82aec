"""Several samples to a row, so that hardly a position is left to padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from orchestrator.data.storage import Row

WINDOW = 4096
"""Samples that are packed together: enough for a full fit, and few enough to hold."""


def packed(samples: Sequence[Row], block_length: int) -> list[Row]:
    """Rows of at most `block_length` tokens, by best fit: the longest first, each where it leaves the least room.

    Best-fit decreasing needs at most 11/9 of the fewest rows there could be (Johnson 1973), and for lengths as they come
    hardly more than the fewest.
    """
    rows: list[list[Row]] = []
    free: list[tuple[int, int]] = []
    """What each row has left, ascending, and its place."""
    for sample in sorted(samples, key=lambda sample: -len(sample.tokens)):
        length = len(sample.tokens)
        found = bisect_left(free, (length, 0))
        if found == len(free):
            rows.append([])
            room, place = block_length, len(rows) - 1
        else:
            room, place = free.pop(found)
        rows[place].append(sample)
        if room > length:
            insort(free, (room - length, place))
    return [_joined(row) for row in rows]


def _joined(samples: Sequence[Row]) -> Row:
    return Row(
        tokens=np.concatenate([row.tokens for row in samples]),
        loss_mask=np.concatenate([row.loss_mask for row in samples]),
        ends=np.cumsum([len(row.tokens) for row in samples]).astype(np.int32),
    )
