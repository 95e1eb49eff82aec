"""Which documents count. What decides about one is what it says, so every process decides alike, in any order."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.data.instructions import Instruction

Item = str | Instruction
"""A document or an instruction with its answers."""

_DIGEST_BYTES = 16
_SHARE_BYTES = 8


@dataclass(frozen=True)
class Split:
    """A part of the documents is held out; a document and its copies are on one side."""

    held_out: float
    """The share that is."""
    side: Literal["learned", "held_out"]
    """Which documents are meant here."""


@dataclass(frozen=True)
class Choice:
    """What is done about documents that may not be wanted."""

    bad: Literal["stop", "skip"] = "stop"
    """Records that cannot be read."""
    deduplicate: bool = False
    """Whether only the first of equal documents counts."""
    split: Split | None = None
    seed: int = 0
    """Decides about the split, and which documents a weight such as 0.5 takes."""

    def identity(self, has_shares: bool) -> dict[str, Any]:
        """What the rows depend on."""
        depends_on_seed = self.split is not None or has_shares
        return asdict(self) | {"seed": self.seed if depends_on_seed else None}

    def is_on_side(self, mark: bytes) -> bool:
        """Whether the document with that digest is on the side that is meant."""
        if self.split is None:
            return True
        is_held_out = self._place(mark, b"split") < self.split.held_out
        return is_held_out == (self.split.side == "held_out")

    def is_in_share(self, mark: bytes, share: float) -> bool:
        """Whether the document is among those that a share of all takes."""
        return share >= 1 or self._place(mark, b"share") < share

    def _place(self, mark: bytes, purpose: bytes) -> float:
        """From 0 to 1, evenly over all documents."""
        key = purpose + self.seed.to_bytes(8, "little")
        drawn = hashlib.blake2b(mark, digest_size=_SHARE_BYTES, key=key).digest()
        return int.from_bytes(drawn, "little") / 2 ** (8 * _SHARE_BYTES)


EVERYTHING = Choice()
"""Every document, as often as there is one."""


def digest(item: Item) -> bytes:
    """16 bytes over what a document or a conversation says."""
    text = item if isinstance(item, str) else json.dumps([(message.role, message.content) for message in item.messages])
    return hashlib.blake2b(text.encode("utf-8"), digest_size=_DIGEST_BYTES).digest()
