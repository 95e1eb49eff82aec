"""Exact deduplication: which of all documents say what an earlier one has said."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.data.part import firsts_file, marks_file
from orchestrator.data.slices import Part
from orchestrator.store import sync_files

_BUCKETS = 16
"""Digests are compared a bucket at a time, so that not all are in memory at once."""


def find_firsts(workshop: Path, parts: Sequence[Part]) -> None:
    """From the digests of all slices, leaves for each which of its documents are the first of their kind."""
    slices = list({piece.name: piece for part in parts for piece in part.slices}.values())
    marks = [np.load(marks_file(workshop, piece), mmap_mode="r") for piece in slices]
    offsets = np.cumsum([0, *map(len, marks)])
    is_first = np.zeros(offsets[-1], np.bool_)
    for bucket in range(_BUCKETS):
        chosen = [np.flatnonzero(part[:, 0] % _BUCKETS == bucket) for part in marks]
        found = np.concatenate([part[rows] for part, rows in zip(marks, chosen, strict=True)])
        places = np.concatenate([rows + offset for rows, offset in zip(chosen, offsets, strict=False)])
        is_first[places[_firsts(found)]] = True
    for piece, start, stop in zip(slices, offsets[:-1], offsets[1:], strict=True):
        np.save(firsts_file(workshop, piece), is_first[start:stop])
    sync_files(workshop)


def _firsts(marks: np.ndarray) -> np.ndarray:
    """Of digests uint8 [n, 16], the places of those that no earlier one equals."""
    halves = np.ascontiguousarray(marks).view(np.uint64)
    # A stable sort: equal ones stay in their order.
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    differs = np.ones(len(order), np.bool_)
    differs[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[differs]
