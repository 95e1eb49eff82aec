"""When a checkpoint is saved, by whom, and what is in it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.generations import newest_good
from orchestrator.checkpoint.writer import CheckpointWriter
from orchestrator.engine import StateStream, StepResult, Wishes
from orchestrator.model.tensor_stream import Part, TensorStream
from orchestrator.plan.checkpoints import checkpoint_steps
from orchestrator.train.checkpoint_hook import CheckpointHook
from orchestrator.train.loop import Progress

FINGERPRINT = "f" * 64
NUM_STEPS = 10
GOOD = StepResult(loss=2.5, gradient_norm=0.5, learning_rate=3e-4, num_tokens=8, num_targets=8)
BAD = replace(GOOD, loss=math.nan)
SAVE, STOP = replace(GOOD, wishes=Wishes(save=True)), replace(GOOD, wishes=Wishes(stop=True))


class Training:
    """Steps of an engine whose weight is their number, told to a CheckpointHook as the loop tells them."""

    def __init__(
        self,
        folder: Path,
        every_steps: int | None = None,
        is_writer: bool = True,
        keep: int = 20,
        best: Mapping[int, int] | None = None,
    ) -> None:
        """`best` is the best step, from the step on at which it became that."""
        self.events: list[Mapping[str, Any]] = []
        self.kept: list[bool] = []
        """What was asked of the engine and read to its end, and how often."""
        self.writer = CheckpointWriter(folder, FINGERPRINT, keep=keep, max_failures=1, report=self.events.append)
        writer = self.writer if is_writer else None
        self._best = best or {}
        self.hook = CheckpointHook(self.state, writer, self.describe, every_steps, NUM_STEPS, self.best)
        self.progress = Progress()

    def state(self, keep: bool) -> StateStream:
        tensors = {"master.weight": torch.full((3,), float(self.progress.step))} if keep else {}
        stream = TensorStream.of(tensors)
        return StateStream(replace(stream, parts=self.read(keep, stream.parts)), {"updates": self.progress.step})

    def read(self, keep: bool, parts: Iterable[Part]) -> Iterator[Part]:
        yield from parts
        self.kept.append(keep)

    def best(self) -> int | None:
        return next((best for since, best in sorted(self._best.items(), reverse=True) if since <= self.progress.step), None)

    @staticmethod
    def describe(progress: Progress, numbers: Mapping[str, int | float]) -> Mapping[str, Any]:
        return {"tokens": progress.tokens, "numbers": numbers}

    def steps(self, results: Mapping[int, StepResult], last: int = NUM_STEPS) -> list[int]:
        """Takes all steps to the last, some with other results; gives those at which the engine was asked for its state."""
        found = []
        for step in range(1, last + 1):
            before, result = len(self.kept), results.get(step, GOOD)
            self.progress = self.progress.after(result.num_tokens)
            self.hook.after_step(self.progress, result)
            found += [step] if len(self.kept) > before else []
        return found


@pytest.mark.parametrize(
    ("every_steps", "results", "saved"),
    [
        (3, {}, [3, 6, 9, 10]),
        (5, {}, [5, 10]),
        (None, {}, [10]),
        (None, {2: SAVE, 7: SAVE}, [2, 7, 10]),
        (4, {4: SAVE, 5: SAVE}, [4, 5, 8, 10]),
        (4, {3: STOP}, [3, 4, 8, 10]),
        (4, {4: BAD, 5: replace(SAVE, loss=math.inf), 6: replace(STOP, gradient_norm=math.nan), 10: BAD}, [8]),
    ],
)
def test_it_saves_by_steps_by_wish_and_at_the_end_but_nothing_bad(
    tmp_path: Path, every_steps: int | None, results: Mapping[int, StepResult], saved: list[int]
) -> None:
    assert Training(tmp_path, every_steps).steps(results) == saved


def test_a_step_that_fp16_skips_is_as_good_as_another(tmp_path: Path) -> None:
    skipped = replace(GOOD, gradient_norm=math.nan, skipped=True)
    assert Training(tmp_path, every_steps=5).steps({5: skipped}) == [5, 10]


def test_what_is_saved_is_the_state_and_how_far_it_came(tmp_path: Path) -> None:
    training = Training(tmp_path, every_steps=4)
    training.steps({}, last=4)
    training.writer.finish()
    checkpoint, damages = newest_good(tmp_path, FINGERPRINT)
    assert checkpoint is not None
    assert damages == []
    assert checkpoint.step == 4
    assert checkpoint.tensors["master.weight"].tolist() == [4.0] * 3
    assert checkpoint.state == {"tokens": 4 * GOOD.num_tokens, "numbers": {"updates": 4}}
    assert training.kept == [True]


def test_one_that_stops_has_saved_when_the_step_is_over(tmp_path: Path) -> None:
    training = Training(tmp_path, every_steps=2)
    training.steps({3: STOP}, last=3)
    assert checkpoint_steps(tmp_path) == [2, 3]
    assert [event["step"] for event in training.events] == [2, 3]
    training.writer.finish()


def test_where_there_is_no_writer_the_others_are_helped_and_nothing_is_kept(tmp_path: Path) -> None:
    training = Training(tmp_path, every_steps=5, is_writer=False)
    assert training.steps({2: SAVE}) == [2, 5, 10]
    assert training.kept == [False] * 3
    assert list(tmp_path.iterdir()) == []


def test_the_best_state_is_saved_and_stays_however_many_follow(tmp_path: Path) -> None:
    training = Training(tmp_path, keep=2, best={3: 3, 9: 9})
    # A stop is waited for, so that none is left out.
    assert training.steps(dict.fromkeys((2, 4, 6, 8), STOP), last=8) == [2, 3, 4, 6, 8]
    training.writer.finish()
    assert checkpoint_steps(tmp_path) == [3, 6, 8]


def test_a_better_one_takes_the_place_of_the_best(tmp_path: Path) -> None:
    training = Training(tmp_path, keep=2, best={3: 3, 7: 7})
    assert training.steps(dict.fromkeys((2, 4, 6, 8, 9), STOP), last=9) == [2, 3, 4, 6, 7, 8, 9]
    training.writer.finish()
    assert checkpoint_steps(tmp_path) == [7, 8, 9]
