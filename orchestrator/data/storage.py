"""Rows of tokens on disk: six .npy files that grow while the corpus streams by, and are mapped when it is read."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.lib import format as npy

ARRAYS: dict[str, type[np.generic]] = {
    "tokens.npy": np.int32,
    "loss_mask.npy": np.bool_,
    "offsets.npy": np.int64,
    "targets.npy": np.int32,
    "sample_ends.npy": np.int32,
    "sample_offsets.npy": np.int64,
}
"""tokens and loss_mask are flat; row i lies from offsets[i] to offsets[i + 1] and has targets[i] positions with loss.
Where its samples end is in sample_ends, from sample_offsets[i] to sample_offsets[i + 1], counted from the row's begin."""


class Row(NamedTuple):
    """A sequence of tokens [n], which of them carry loss [n], and where its samples end."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    ends: np.ndarray | None = None
    """int32 [samples], the last is n. None for a row that is one sample."""

    @property
    def starts(self) -> np.ndarray:
        """int64 [samples]: the first token of each."""
        return np.array([0] if self.ends is None else [0, *self.ends[:-1]])

    @property
    def targets(self) -> int:
        """What the causal loss counts: nothing predicts a sample's first token."""
        return int(np.count_nonzero(self.loss_mask) - np.count_nonzero(self.loss_mask[self.starts]))


class GrowingArray:
    """A flat .npy file that is appended to; its header tells the length once it is closed."""

    def __init__(self, path: Path, dtype: type[np.generic], length: int = 0) -> None:
        """A file that is there goes on behind its first `length` values."""
        self.length = length
        self._dtype = np.dtype(dtype)
        self._file = path.open("r+b" if length else "wb")
        self._write_header()
        self._file.truncate(self._file.tell() + length * self._dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self.length += len(values)

    def sync(self) -> None:
        """What was appended is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that a longer length still fits in the same number of bytes.
        description = npy.dtype_to_descr(self._dtype)
        npy.write_array_header_1_0(self._file, {"descr": description, "fortran_order": False, "shape": (self.length,)})


class RowWriter:
    """Appends rows to the arrays of a folder; readable once the `with` block is left."""

    def __init__(self, folder: Path, lengths: Mapping[str, int] | None = None) -> None:
        """Goes on behind the first `lengths` values of the arrays that are there."""
        lengths = lengths or {}
        self._arrays = {name: GrowingArray(folder / name, dtype, lengths.get(name, 0)) for name, dtype in ARRAYS.items()}
        if not lengths:
            self._arrays["offsets.npy"].append(np.zeros(1))
            self._arrays["sample_offsets.npy"].append(np.zeros(1))
        self.targets = 0
        """Positions with loss in the rows that were appended one by one."""

    @property
    def lengths(self) -> dict[str, int]:
        """Values in each array."""
        return {name: array.length for name, array in self._arrays.items()}

    @property
    def rows(self) -> int:
        return self._arrays["targets.npy"].length

    @property
    def tokens(self) -> int:
        return self._arrays["tokens.npy"].length

    def append(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        targets = np.array([row.targets for row in rows])
        assert targets.all(), "a row without targets"
        self._arrays["offsets.npy"].append(self.tokens + np.cumsum([len(row.tokens) for row in rows]))
        self._arrays["tokens.npy"].append(np.concatenate([row.tokens for row in rows]))
        self._arrays["loss_mask.npy"].append(np.concatenate([row.loss_mask for row in rows]))
        self._arrays["targets.npy"].append(targets)
        ends = [np.array([len(row.tokens)]) if row.ends is None else row.ends for row in rows]
        samples = self._arrays["sample_ends.npy"].length
        self._arrays["sample_offsets.npy"].append(samples + np.cumsum([len(each) for each in ends]))
        self._arrays["sample_ends.npy"].append(np.concatenate(ends))
        self.targets += int(targets.sum())

    def append_folder(self, folder: Path) -> None:
        """The rows of another folder."""
        begins = {"offsets.npy": self.tokens, "sample_offsets.npy": self._arrays["sample_ends.npy"].length}
        for name, array in self._arrays.items():
            values = np.load(folder / name, mmap_mode="r")
            # Where the rows before end, the first of these begins.
            array.append(values[1:] + begins[name] if name in begins else values)

    def sync(self) -> None:
        for array in self._arrays.values():
            array.sync()

    def close(self) -> None:
        for array in self._arrays.values():
            array.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
