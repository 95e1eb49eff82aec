"""A stage's history and numbers while it runs: the ledger's copy in the store, and how far ranks of other machines are.

Where the run root is a folder, they are the files in it and no more.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.lease import Lease
from orchestrator.run_root import RunRoot
from orchestrator.store import write_bytes
from orchestrator.tracking.ledger import LEDGER_NAME, Ledger
from orchestrator.tracking.metrics import METRICS_NAME, GrowingMetrics, read_metrics

_PUBLISH_SECONDS = 5.0
"""Between two uploads of a ledger, at least."""
_LOOK_SECONDS = 30.0
"""Between two looks at numbers that come from another machine; they are published with each checkpoint."""


def open_ledger(root: RunRoot, stage_folder: Path, lease: Lease, say: Callable[[str], None]) -> Ledger:
    """The ledger of a stage, which everybody can read who sees the run root."""
    if root.url is None:
        return Ledger(stage_folder / LEDGER_NAME)
    return _PublishedLedger(root, stage_folder / LEDGER_NAME, lease, say)


class _PublishedLedger(Ledger):
    """Uploads itself beside the work, as soon as there is something new but not too often, and a last time when closed."""

    def __init__(self, root: RunRoot, path: Path, lease: Lease, say: Callable[[str], None]) -> None:
        super().__init__(path)
        self._root, self._inside = root, root.inside(path)
        self._lease, self._say = lease, say
        self._has_news, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_published, daemon=True, name="ledger")
        self._thread.start()

    def write(self, event: str, **fields: Any) -> None:
        super().write(event, **fields)
        self._has_news.set()

    def close(self) -> None:
        self._is_over.set()
        self._has_news.set()
        self._thread.join()
        super().close()

    def _keep_published(self) -> None:
        works = True
        while not self._is_over.is_set():
            self._has_news.wait()
            self._has_news.clear()
            works = self._publish(works)
            self._is_over.wait(_PUBLISH_SECONDS)
        self._publish(works)

    def _publish(self, worked: bool) -> bool:
        """Whether it works; a person is told when that changes."""
        try:
            # Once the lease is lost the stage is somebody else's, and its ledger, too.
            if not self._lease.is_lost:
                self._root.publish_file(self._inside)
        except StorageError as error:
            if worked:
                self._say(f"  {error}; the stage goes on, and the next event tries again")
            return False
        return True


class Numbers:
    """The metrics of a stage so far, as a person who looks on from this machine gets to see them."""

    def __init__(self, root: RunRoot, stage_folder: Path) -> None:
        self._root = root
        self._here = stage_folder / METRICS_NAME
        self._growing = GrowingMetrics(self._here)
        self._from_elsewhere = stage_folder / "logs" / METRICS_NAME
        self._from_elsewhere.unlink(missing_ok=True)
        self._looked = time.monotonic()

    def rows(self) -> list[dict[str, Any]]:
        here = self._growing.rows()
        if self._root.url is None:
            return here
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._look(here)
        return max(here, read_metrics(self._from_elsewhere), key=_newest)

    def _look(self, here: list[dict[str, Any]]) -> None:
        # Where rank 0 is on this machine, nobody has newer numbers.
        if time.time() - _newest(here) < _LOOK_SECONDS:
            return
        # They are only looked at; what is wrong with the store is said by those who need it.
        with suppress(StorageError):
            if content := self._root.read(self._root.inside(self._here)):
                write_bytes(self._from_elsewhere, content)


def _newest(rows: list[dict[str, Any]]) -> float:
    """Seconds since the epoch."""
    return rows[-1]["time"] if rows else 0.0
