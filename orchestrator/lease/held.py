"""A stage held: a lease that its holder rewrites every few seconds, and how one is taken over from a holder that died.

A holder that dies does not remove its lease. On the same machine its process is looked for; of another machine's holder one
sees only whether the lease changes, so it is watched, and no two machines' clocks are compared. A holder that was merely cut
off for so long learns that it has lost the stage when it next looks at the lease.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from orchestrator.errors import LeaseError, StorageError
from orchestrator.lease.holder import Holder, is_gone, ourselves, timestamp
from orchestrator.lease.places import Found, Made, Place
from orchestrator.store import sha256_text

LEASE_NAME = "lease.json"
RENEW_SECONDS = 4.0
_LOOKS = 40
"""So often an expiring lease is looked at before it counts as dead."""


class Lease:
    """A stage that this process holds. A thread keeps renewing it."""

    def __init__(self, place: Place, made: Made, holder: Holder, renew_seconds: float, expires_seconds: float) -> None:
        self._place, self._made, self._holder = place, made, holder
        self._renew_seconds, self._expires_seconds = renew_seconds, expires_seconds
        self._renewed = _now()
        self._lost: str | None = None
        self._trouble = "the storage does not answer"
        self._has_ended = False
        self._wake, self._has_looked = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether the stage may be somebody else's by now. Answers at once, unless the lease is overdue."""
        if self._lost is None and self._is_overdue():
            # This process, or its machine, has been asleep. What was known before counts for nothing: look again first.
            self._has_looked.clear()
            self._wake.set()
            self._has_looked.wait(self._renew_seconds)
            if self._is_overdue():
                self._give_up_overdue()
        return self._lost is not None

    def check(self) -> None:
        """Raises LeaseError once the lease is lost; from then on nothing may be written to the stage."""
        if self.is_lost:
            raise LeaseError(f"{self._place.where}: {self._lost}; this run stops, and writes no more to that stage")

    def release(self) -> None:
        """Ends the renewing and removes the lease, if it is still ours."""
        self._has_ended = True
        self._wake.set()
        self._thread.join(self._renew_seconds)
        if self._thread.is_alive():
            # The storage hangs, and would hang us too; what was made is still in use. The lease dies with this process.
            return
        self._made.close()
        # A lease that cannot be removed dies with this process.
        with suppress(OSError, StorageError):
            if self._lost is None and self._is_ours(self._place.look(LEASE_NAME)):
                self._place.remove(LEASE_NAME)

    def _keep(self) -> None:
        while self._lost is None:
            self._wake.wait(self._renew_seconds)
            self._wake.clear()
            if self._has_ended:
                return
            self._renew()
            self._has_looked.set()

    def _renew(self) -> None:
        began = _now()
        try:
            found = self._place.look(LEASE_NAME)
            if self._is_ours(found):
                self._made.renew(replace(self._holder, renewed=timestamp()).as_bytes())
                self._renewed = began
                if self._made.may_overwrite and self._is_overdue():
                    # Asleep between the look and the write, it may have replaced a successor's, who then stops as well.
                    self._give_up_overdue()
            else:
                self._lost = f"it is now run by {found.who}" if found else f"its {LEASE_NAME} was removed"
        except (OSError, StorageError) as error:
            self._trouble = str(error)
            if self._is_overdue():
                self._give_up_overdue()

    def _is_ours(self, found: Found | None) -> bool:
        return found is not None and found.holder is not None and found.holder.id == self._holder.id

    def _is_overdue(self) -> bool:
        return _now() - self._renewed > self._expires_seconds

    def _give_up_overdue(self) -> None:
        self._lost = self._lost or (
            f"the lease could not be renewed for {self._expires_seconds:g} seconds, "
            f"after which another run may have the stage ({self._trouble})"
        )


@contextmanager
def held(
    place: Place,
    command: str,
    say: Callable[[str], None] = print,
    renew_seconds: float = RENEW_SECONDS,
    expires_seconds: float | None = None,
) -> Iterator[Lease]:
    """Holds the stage whose leases lie in `place`. `say` is told of waiting and of taking over.

    Raises LeaseError when another holds it, StorageError when its place cannot be written to.
    """
    holder, expires_seconds = ourselves(command), place.expires_seconds if expires_seconds is None else expires_seconds
    try:
        made = _Taker(place, holder, say, expires_seconds).take(LEASE_NAME)
        place.remove_claims()
    except OSError as error:
        raise StorageError(
            f"{place.where}/{LEASE_NAME}: the stage cannot be reserved for this run: {error.strerror}"
        ) from error
    lease = Lease(place, made, holder, renew_seconds, expires_seconds)
    try:
        yield lease
    finally:
        lease.release()


@dataclass(frozen=True)
class _Taker:
    place: Place
    holder: Holder
    say: Callable[[str], None]
    expires_seconds: float

    def take(self, name: str) -> Made:
        """Makes the lease, which only one of several can. Raises LeaseError while another lives."""
        while True:
            if made := self.place.create(name, self.holder.as_bytes()):
                return made
            found = self.place.look(name)
            if found is None:
                continue
            if self._is_dead(name, found):
                self._remove(name, found)
            elif now := self.place.look(name):
                raise LeaseError(f"{self.place.where}: is being run by {now.who}; wait for it, or stop it there")

    def _is_dead(self, name: str, found: Found) -> bool:
        has_ended = is_gone(found.holder) if found.holder else None
        if has_ended is None:
            has_ended = self._stays_unchanged(name, found)
        if has_ended:
            self.say(f"{self.place.where}: taken over from a run that has ended: {found.who}")
        return has_ended

    def _stays_unchanged(self, name: str, found: Found) -> bool:
        # Looks are counted, not seconds: a watcher that was itself asleep, or waited for its storage, has seen nothing then.
        for look in range(_LOOKS):
            if look == 1:
                waiting = f"waiting up to {self.expires_seconds:g} seconds to see whether another run goes on"
                self.say(f"{self.place.where}: {waiting}: {found.who}")
            time.sleep(self.expires_seconds / _LOOKS)
            if self.place.look(name) != found:
                return False
        return True

    def _remove(self, name: str, dead: Found) -> None:
        """Removes a dead lease, and never one that was made since.

        Of two that saw it dead, the slower would remove what the faster has made. So only he may remove it who holds the
        claim, a lease of its own that is named after the dead one, and who then still sees that one.
        """
        claim = self.place.claim(sha256_text(repr(dead))[:16])
        made = self.take(claim)
        try:
            if self.place.look(name) == dead:
                self.place.remove(name)
        finally:
            made.close()
            self.place.remove(claim)


def _now() -> float:
    """Seconds, those that the machine was suspended included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
