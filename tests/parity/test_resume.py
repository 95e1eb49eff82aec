"""A run that goes on from a saved state is the run that was never interrupted, whoever goes on with it.

On as many ranks it is so to the bit. On others, at another ZeRO level or micro-batch, sums are added up in another order.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from orchestrator.engine import Engine, EngineState, StepResult, Wishes
from orchestrator.errors import TrainingError
from tests.distributed import run_on_ranks
from tests.parity.tiny_run import LEARNING_RATE, STEPS, Curve, Precision, TinyRun, take_steps, tiny_engine

pytestmark = pytest.mark.slow

MIDDLE = 3
"""Steps before the interruption."""
DROPOUT = 0.3
LEVELS: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
SIZE = 2
OTHER_SIZES = {1: 6, 2: 3, 3: 4}
"""Of a micro-batch, by ranks, for a global batch of 12."""
CASES: list[tuple[Precision, int, Literal[0, 1, 2, 3], int]] = [
    *((precision, ranks, zero, SIZE) for precision in PRECISIONS for ranks in OTHER_SIZES for zero in LEVELS),
    *((precision, ranks, 2, size) for precision in PRECISIONS for ranks, size in OTHER_SIZES.items()),
]
"""Precision, ranks, ZeRO level and micro-batch of the engine that goes on."""

# Measured over three steps: losses within 1.0e-4 and norms within 1.7e-3 of themselves in bf16; 7e-7 and 3e-7 in fp32.
LOSS_TOLERANCE = {"bf16": 4e-4, "fp32": 1e-5}
NORM_TOLERANCE = {"bf16": 5e-3, "fp32": 1e-5}
# Measured between ZeRO levels over six steps: 4.1e-5 and 5.2e-5.
FP16_LOSS_TOLERANCE, FP16_NORM_TOLERANCE = 1.5e-4, 2e-4

EMBEDDING = "model.model.embed_tokens.weight"
NO_WISH, STOP, SAVE, BOTH = Wishes(), Wishes(stop=True), Wishes(save=True), Wishes(stop=True, save=True)
WISHES = ((NO_WISH, STOP), (NO_WISH, NO_WISH), (SAVE, STOP))
"""By step and rank."""
FORGOTTEN: list[tuple[Precision, str]] = [
    *((precision, what) for precision in PRECISIONS for what in ("moments", "one update")),
    # In bf16 another dropout is hardly more than noise.
    ("fp32", "dropout"),
]


@dataclass(frozen=True)
class Saved:
    """A state as it lies on disk."""

    tensors: bytes
    numbers: str

    @classmethod
    def of(cls, state: EngineState) -> "Saved":
        return cls(save(state.tensors), json.dumps(state.numbers))

    def read(self) -> EngineState:
        return EngineState(load(self.tensors), json.loads(self.numbers))


@dataclass(frozen=True)
class Interrupted:
    """A run that nothing interrupted, and what new engines made of its states."""

    straight: Curve
    from_start: Curve
    from_middle: Curve
    start: Saved
    middle: Saved
    end: Saved
    end_from_middle: Saved


@dataclass(frozen=True)
class Continued:
    """What an engine made of another one's state."""

    differing: list[str]
    """What it had not taken over exactly."""
    curve: Curve


@pytest.fixture(scope="module")
def two_ranks(base: Path, text_rows: Path) -> dict[tuple, Any]:
    """All that two ranks do, by function and case; starting them takes longer than most of it."""
    run = TinyRun(base, text_rows, "fp32", dropout=DROPOUT)
    jobs: dict[tuple, TinyRun] = {}
    for zero in LEVELS:
        jobs |= {(interrupt, each, zero): replace(run, precision=each, zero=zero) for each in (*PRECISIONS, "fp16")}
        jobs |= {(overflow, zero): replace(run, precision="fp16", zero=zero)}
    source = replace(run, global_batch_size=12)
    for precision in PRECISIONS:
        jobs |= {(begin, precision, each): replace(source, precision=precision, dropout=each) for each in (DROPOUT, 0.0)}
    return run_on_ranks(do, 2, jobs | {(repeat,): run, (ask,): source, (refuse,): replace(run, zero=3)})


@pytest.fixture(scope="module")
def continued(base: Path, text_rows: Path, two_ranks) -> dict[tuple, Continued]:
    """What others made of a state that two ranks with three micro-batches left at ZeRO 2, by case; and of spoiled ones."""
    runs = {case: TinyRun(base, text_rows, case[0], 12, case[3], case[2], dropout_of(case[3])) for case in CASES}
    jobs = {case: (run, two_ranks[begin, run.precision, run.dropout][1]) for case, run in runs.items()}
    found = {}
    for ranks in OTHER_SIZES:
        mine = {(go_on, *case): job for case, job in jobs.items() if case[1] == ranks}
        if ranks == 1:
            mine |= {(go_on, each, what): spoil(what, *jobs[each, 1, 2, SIZE]) for each, what in FORGOTTEN}
        found |= run_on_ranks(do, ranks, mine)
    return found


@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize("precision", [*PRECISIONS, "fp16"])
def test_a_new_engine_goes_on_to_the_bit(two_ranks, precision, zero):
    run = two_ranks[interrupt, precision, zero]
    assert run.from_middle == run.straight[MIDDLE:]
    middle, end, same_end = run.middle.read(), run.end.read(), run.end_from_middle.read()
    assert same_end.numbers == end.numbers
    assert differing(same_end.tensors, end.tensors) == []
    assert len(differing(middle.tensors, end.tensors)) == len(end.tensors)


@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize("precision", [*PRECISIONS, "fp16"])
def test_a_state_before_any_step_is_a_start(two_ranks, precision, zero):
    run = two_ranks[interrupt, precision, zero]
    start = run.start.read()
    assert (start.numbers["updates"], run.middle.read().numbers["updates"]) == (0, MIDDLE)
    assert [key for key, tensor in start.tensors.items() if tensor.any() and not key.startswith("master.")] == []
    assert run.from_start == run.straight[: len(run.from_start)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{} {} ranks, zero {}, micro-batch {}".format(*case))
def test_other_ranks_levels_and_micro_batches_go_on(two_ranks, continued, case):
    precision, _, _, size = case
    straight, made = two_ranks[begin, precision, dropout_of(size)][0][MIDDLE:], continued[go_on, *case]
    assert made.differing == []
    losses, norms = zip(*made.curve, strict=True)
    straight_losses, straight_norms = zip(*straight, strict=True)
    assert losses == pytest.approx(straight_losses, rel=0, abs=LOSS_TOLERANCE[precision])
    assert norms == pytest.approx(straight_norms, rel=NORM_TOLERANCE[precision])


@pytest.mark.parametrize(("precision", "what"), FORGOTTEN)
def test_what_is_forgotten_would_be_seen(two_ranks, continued, precision, what):
    straight, made = two_ranks[begin, precision, DROPOUT][0][MIDDLE:], continued[go_on, precision, what]
    differences = [abs(loss - right) for (loss, _), (right, _) in zip(made.curve, straight, strict=True)]
    assert max(differences) > 10 * LOSS_TOLERANCE[precision]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_fp16_learns_the_same_at_every_level(two_ranks, zero):
    losses, norms = zip(*two_ranks[interrupt, "fp16", zero].straight, strict=True)
    other_losses, other_norms = zip(*two_ranks[interrupt, "fp16", 1].straight, strict=True)
    assert losses == pytest.approx(other_losses, rel=0, abs=FP16_LOSS_TOLERANCE)
    assert norms == pytest.approx(other_norms, rel=FP16_NORM_TOLERANCE)


@pytest.mark.parametrize("zero", LEVELS)
def test_an_overflow_in_fp16_is_skipped_and_bad_only_at_the_least_scale(two_ranks, zero):
    too_large, spent, states = two_ranks[overflow, zero]
    assert (too_large.skipped, too_large.scale_is_spent, too_large.is_bad) == (True, False, False)
    assert (spent.skipped, spent.scale_is_spent, spent.is_bad) == (True, True, True)
    assert math.isfinite(spent.loss)
    loaded, after = states[0].read(), states[1].read()
    assert (loaded.numbers["cur_scale"], loaded.numbers["updates"]) == (2.0**60, 0)
    assert (after.numbers["last_overflow_iter"], after.numbers["updates"]) == (0, 0)
    assert differing(after.tensors, loaded.tensors) == []


def test_each_step_drops_other_units_and_always_the_same(two_ranks):
    loss, same, other = two_ranks[repeat,]
    assert loss == same
    assert loss != other


def test_what_one_rank_asks_for_all_get(two_ranks):
    wishes, losses = two_ranks[ask,]
    assert wishes == [[STOP, NO_WISH, BOTH]] * 2
    assert losses == [loss for loss, _ in two_ranks[begin, "fp32", DROPOUT][0][: len(losses)]]


def test_tensors_that_do_not_fit_are_refused_by_name_on_all_ranks(two_ranks):
    messages = [
        f"the saved state lacks exp_avg.{EMBEDDING}, which this stage trains",
        "the saved state holds master.model.other, which this stage does not train",
        f"the saved state's exp_avg_sq.{EMBEDDING} is (64, 512), this stage's is (512, 64)",
    ]
    assert two_ranks[refuse,] == [messages] * 2


def do(jobs: Mapping[tuple, Any]) -> dict[tuple, Any]:
    """What each key's function makes of the key's value; all ranks call this and the functions."""
    # torch computes fp16 on a CPU too, if slowly; DeepSpeed would refuse.
    type(deepspeed.get_accelerator()).is_fp16_supported = lambda _: True
    return {key: key[0](argument) for key, argument in jobs.items()}


def interrupt(run: TinyRun) -> Interrupted:
    engine = tiny_engine(run)
    start = state_of(engine)
    straight = take_steps(engine, run, 0, MIDDLE)
    # Turned into bytes only after the engine has gone on, which must not touch it.
    middle = state_of(engine)
    straight += take_steps(engine, run, MIDDLE, STEPS)
    other = resume(run, Saved.of(middle))
    from_middle = take_steps(other, run, MIDDLE, STEPS)
    from_start = take_steps(resume(run, Saved.of(start)), run, 0, 2)
    states = [Saved.of(state) for state in (start, middle, state_of(engine), state_of(other))]
    return Interrupted(straight, from_start, from_middle, *states)


def begin(run: TinyRun) -> tuple[Curve, Saved]:
    """All steps, and the state in the middle."""
    engine = tiny_engine(run)
    curve = take_steps(engine, run, 0, MIDDLE)
    saved = Saved.of(state_of(engine))
    return curve + take_steps(engine, run, MIDDLE, STEPS), saved


def go_on(source: tuple[TinyRun, Saved]) -> Continued:
    run, saved = source
    engine = resume(run, saved)
    state, expected = state_of(engine), saved.read()
    # Sorted, since safetensors gives them to each rank in another order.
    names = sorted(key.removeprefix("master.") for key in expected.tensors if key.startswith("master."))
    weights = dict(engine.parameters(names))
    rounded = {name: expected.tensors[f"master.{name}"].to(weights[name].dtype) for name in names}
    wrong = differing(weights, rounded)
    if dist.get_rank() == 0:
        wrong += differing(state.tensors, expected.tensors)
    wrong += ["numbers"] if state.numbers != expected.numbers else []
    return Continued(wrong, take_steps(engine, run, MIDDLE, STEPS))


def overflow(run: TinyRun) -> tuple[StepResult, StepResult, tuple[Saved, Saved]]:
    """A step at a loss scale far too large, and one of gradients too large for the least; the state around the first."""
    engine, batch = tiny_engine(run), run.batches(dist.get_rank(), dist.get_world_size()).of_step(0)
    state = state_of(engine)
    give(engine, replace(state, numbers=state.numbers | {"cur_scale": 2.0**60}))
    loaded = state_of(engine)
    too_large = engine.step(batch, LEARNING_RATE, 0)
    after = state_of(engine)
    give(engine, replace(state, numbers=state.numbers | {"cur_scale": 1.0, "cur_hysteresis": 1}))
    spent = engine.step(replace(batch, num_targets=cast(int, 1e-9)), LEARNING_RATE, 0)
    return too_large, spent, (Saved.of(loaded), Saved.of(after))


def repeat(run: TinyRun) -> list[float]:
    """The loss of one batch in steps 7, 7 and 8, which learn nothing."""
    engine, batch = tiny_engine(run), run.batches(dist.get_rank(), dist.get_world_size()).of_step(0)
    take_steps(engine, run, 0, MIDDLE)
    return [engine.step(batch, 0.0, step).loss for step in (7, 7, 8)]


def ask(run: TinyRun) -> tuple[list[list[Wishes]], list[float]]:
    """What each rank was told at each step, and the losses."""
    rank, batches = dist.get_rank(), run.batches(dist.get_rank(), dist.get_world_size())
    engine = tiny_engine(run)
    results = [
        engine.step(batches.of_step(step), LEARNING_RATE, step, wishes=each[rank]) for step, each in enumerate(WISHES)
    ]
    return from_all([result.wishes for result in results]), [result.loss for result in results]


def refuse(run: TinyRun) -> list[list[str]]:
    """What each rank says to states that do not fit."""
    engine = tiny_engine(run)
    state = state_of(engine)
    spoiled = [
        {key: tensor for key, tensor in state.tensors.items() if key != f"exp_avg.{EMBEDDING}"},
        state.tensors | {"master.model.other": torch.zeros(1)},
        state.tensors | {f"exp_avg_sq.{EMBEDDING}": torch.zeros(64, 512)},
    ]
    messages = []
    for tensors in spoiled:
        with pytest.raises(TrainingError) as refusal:
            give(engine, replace(state, tensors=tensors))
        messages.append(str(refusal.value))
    return from_all(messages)


def spoil(what: str, run: TinyRun, saved: Saved) -> tuple[TinyRun, Saved]:
    """The run and its state without what is forgotten."""
    state = saved.read()
    if what == "moments":
        tensors = {key: each if key.startswith("master.") else each * 0 for key, each in state.tensors.items()}
        return run, Saved.of(replace(state, tensors=tensors))
    if what == "one update":
        return run, Saved.of(replace(state, numbers={"updates": MIDDLE - 1}))
    return replace(run, seed=run.seed + 1), saved


def resume(run: TinyRun, saved: Saved) -> Engine:
    engine = tiny_engine(run)
    give(engine, saved.read())
    return engine


def give(engine: Engine, state: EngineState) -> None:
    engine.load_state(state if dist.get_rank() == 0 else None)


def state_of(engine: Engine) -> EngineState:
    """Rank 0 has the tensors; the others need no memory."""
    state = engine.state(keep=dist.get_rank() == 0).whole()
    assert bool(state.tensors) == (dist.get_rank() == 0)
    return state


def differing(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    assert tensors.keys() == expected.keys()
    return [key for key, tensor in expected.items() if not torch.equal(tensors[key], tensor)]


def from_all(mine: list) -> list[list]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def dropout_of(micro_batch_size: int) -> float:
    """Micro-batches of another size lie in other places, and drop other units."""
    return DROPOUT if micro_batch_size == SIZE else 0.0
