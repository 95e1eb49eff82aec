"""How long the parts of a step take, without making a device wait for the answer."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Adds up what each named part takes: on a GPU by events in its stream, elsewhere by the host's clock."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._inner = 0.0
        """Seconds of the parts inside the one that is under way."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is a part of its own inside it counts to that alone; on a GPU, where the two may overlap, to both."""
        if not self._on_gpu:
            started, outer, self._inner = time.perf_counter(), self._inner, 0.0
            yield
            spent = time.perf_counter() - started
            self._seconds[name] += spent - self._inner
            self._inner = outer + spent
            return
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        yield
        ended.record()
        self._events.append((name, began, ended))

    def forget(self, name: str) -> None:
        """Takes nothing of that part for spent."""
        self._seconds.pop(name, None)

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading. On a GPU to be called once it has done what was asked of it."""
        for name, began, ended in self._events:
            self._seconds[name] += began.elapsed_time(ended) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds
