"""A pipeline handed in once: the job that runs it already is found, one that has ended is followed by another."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

from orchestrator.errors import ClusterError, OrchestratorError
from orchestrator.rayjob.api import AlreadyThere, RayJobs
from orchestrator.rayjob.job import RayJob
from orchestrator.rayjob.names import MAX_NAME, PREFIX
from orchestrator.rayjob.state import JobState, state_of

_LOOK_SECONDS = 2.0
_AWAY_SECONDS = 10.0
"""Until an API server that was away is asked again."""
_LAST_LINES_SECONDS = 10.0
"""A log may reach us after the status does."""

Say = Callable[[str], None]


def submit(jobs: RayJobs, job: RayJob, say: Say) -> str:
    """Hands a job in, unless the same pipeline is on its way already; the name of the one that runs it."""
    fingerprint = job.metadata.labels[f"{PREFIX}fingerprint"]
    known = [state_of(each) for each in jobs.ours(fingerprint)]
    while True:
        if going_on := [state for state in known if not (state.has_ended or state.is_leaving)]:
            return _found(going_on[-1], say)
        name = _free_name(job, known)
        try:
            jobs.create(job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": name})}).as_manifest())
        except AlreadyThere:
            # Somebody else was a moment faster, or has a job of this name that is none of this pipeline.
            other = jobs.named(name)
            known += [state_of(other)] if other else []
            continue
        say(f"handed in as {name} in namespace {job.metadata.namespace}")
        return name


def follow(jobs: RayJobs, name: str, say: Say, show: Say, patience_seconds: float = 300.0) -> JobState:
    """Until the job has ended; `say` gets what happens to it, `show` what its command prints.

    Raises ClusterError when it is deleted meanwhile, or when the API server was away for longer than `patience_seconds`.
    """
    logs, said, answered = _Logs(jobs, name, show), "", time.monotonic()
    while True:
        try:
            found = jobs.named(name)
            logs.look()
            answered = time.monotonic()
        except ClusterError as error:
            # The API server is away now and then, and a job runs for days.
            if time.monotonic() - answered > patience_seconds:
                raise
            say(f"{name}: {error}; asking again")
            time.sleep(min(_AWAY_SECONDS, patience_seconds))
            continue
        if found is None:
            raise ClusterError(f"cluster: the RayJob {name} was deleted; the same command hands it in again, and goes on")
        state = state_of(found)
        if str(state) != said:
            said = str(state)
            say(f"{name}: {said}")
        if state.has_ended:
            logs.finish()
            return state
        time.sleep(_LOOK_SECONDS)


class _Logs:
    """A thread for each pod that prints: a second try has a pod of its own. One whose connection ended is read again."""

    def __init__(self, jobs: RayJobs, name: str, show: Say) -> None:
        self._jobs, self._name, self._show = jobs, name, show
        self._threads: dict[str, threading.Thread] = {}
        self._shown: Counter[str] = Counter()
        """Lines, by pod."""

    def look(self) -> None:
        for pod, is_running in self._jobs.submitters(self._name).items():
            known = self._threads.get(pod)
            if known is None or (is_running and not known.is_alive()):
                self._threads[pod] = threading.Thread(target=self._read, args=(pod,), daemon=True, name=f"log of {pod}")
                self._threads[pod].start()

    def finish(self) -> None:
        until = time.monotonic() + _LAST_LINES_SECONDS
        for thread in self._threads.values():
            thread.join(max(0.0, until - time.monotonic()))

    def _read(self, pod: str) -> None:
        before = self._shown[pod]
        # An error ends this reading; the next look begins another, and how the job ended its status says.
        with suppress(OrchestratorError):
            for line in islice(self._jobs.log(pod, follow=True), before, None):
                self._show(line)
                self._shown[pod] += 1


def _found(state: JobState, say: Say) -> str:
    since = f" since {state.created.astimezone():%Y-%m-%d %H:%M:%S}" if state.created else ""
    say(f"the same pipeline is there already, as {state.name}{since}: {state}")
    return state.name


def _free_name(job: RayJob, known: list[JobState]) -> str:
    """The job's own name, or with a number behind it after others that have ended."""
    assert job.metadata.name
    taken, number, name = {state.name for state in known}, 1, job.metadata.name
    while name in taken:
        number += 1
        ending = f"-{number}"
        name = job.metadata.name[: MAX_NAME - len(ending)] + ending
    return name
