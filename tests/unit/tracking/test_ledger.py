"""The ledger: what was written is read back whatever killed the writer, and a history adds up."""

import json
import math
import multiprocessing
import resource
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import DataError, StorageError
from orchestrator.report.history import described
from orchestrator.tracking.ledger import Ledger, Summary, read_ledger, summarize

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stage" / "ledger.jsonl"


def history(*events: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Each event as its time, its name, and its fields."""
    return [{"time": time, "event": name, **dict(*fields)} for time, name, *fields in events]


def rows(*seconds_at: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "seconds": seconds} for step, seconds in seconds_at]


def write_without_end(path: Path, writer: int) -> None:
    with Ledger(path) as ledger:
        for number in count():
            ledger.write("checkpoint", writer=writer, number=number, filling="文" * (number % 700))


def write_on_a_full_disk(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.write("begin", pid=1)
        # A file that may grow no further takes a part of the line, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, resource.RLIM_INFINITY))
        try:
            ledger.write("failure", message="a line that is longer than what is left")
        except StorageError as error:
            torn = path.read_bytes().rpartition(b"\n")[2]
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            ledger.write("stop", reason=str(error), torn=len(torn))


def test_events_are_read_back_in_order_while_the_file_is_open(path: Path) -> None:
    before = time.time()
    with Ledger(path) as ledger:
        ledger.write("begin", pid=4711, host="gpu-7", command="python launch/run.py recipe=中文")
        ledger.write("failure", cause="worker_lost", rank=3, node=None, message="killed", step=7)
        begin, failure = read_ledger(path)
    assert "中文" in path.read_text(encoding="utf-8")
    assert before <= begin.pop("time") <= failure.pop("time") <= time.time()
    assert begin == {"event": "begin", "pid": 4711, "host": "gpu-7", "command": "python launch/run.py recipe=中文"}
    assert failure == {"event": "failure", "cause": "worker_lost", "rank": 3, "node": None, "message": "killed", "step": 7}


def test_a_missing_file_has_no_events(path: Path) -> None:
    assert read_ledger(path) == []


def test_a_number_that_json_cannot_hold_is_refused_and_leaves_nothing(path: Path) -> None:
    with Ledger(path) as ledger:
        with pytest.raises(ValueError, match="JSON"):
            ledger.write("checkpoint", seconds=math.nan)
        ledger.write("finish", step=1)
    assert [event["event"] for event in read_ledger(path)] == ["finish"]


def test_a_killed_writer_harms_no_line_and_no_later_writer(path: Path) -> None:
    for writer in range(3):
        process = SPAWN.Process(target=write_without_end, args=(path, writer))
        process.start()
        deadline = time.monotonic() + 20
        while sum(event["writer"] == writer for event in read_ledger(path)) < 50:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
    events = read_ledger(path)
    for writer in range(3):
        numbers = [event["number"] for event in events if event["writer"] == writer]
        assert numbers == list(range(len(numbers)))
    assert [event["writer"] for event in events] == sorted(event["writer"] for event in events)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_is_no_event_and_goes_with_the_next_writer(path: Path, cut: int) -> None:
    with Ledger(path) as ledger:
        ledger.write("begin")
        ledger.write("attempt", workers=2)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [event["event"] for event in read_ledger(path)] == ["begin"]
    with Ledger(path) as ledger:
        ledger.write("begin", pid=2)
    assert [event.get("pid") for event in read_ledger(path)] == [None, 2]


def test_a_write_that_fails_is_an_error_and_the_next_stands_on_a_line_of_its_own(path: Path) -> None:
    process = SPAWN.Process(target=write_on_a_full_disk, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    begin, stop = read_ledger(path)
    assert (begin["event"], stop["event"], stop["torn"]) == ("begin", "stop", 30)
    assert stop["reason"] == f"{path}: cannot be written: File too large"


def test_a_ledger_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/ledger\.jsonl: cannot be written: "):
        Ledger(tmp_path / "file" / "ledger.jsonl")


@pytest.mark.parametrize(
    "line", ["{", "", "[1]", '{"event": "begin"}', '{"time": 1.0}', '{"event": "a", "time": "1"}', "\x00\x00"]
)
def test_a_bad_line_elsewhere_is_named(path: Path, line: str) -> None:
    with Ledger(path) as ledger:
        ledger.write("begin")
    path.write_text(path.read_text() + line + "\n" + '{"event": "finish", "time": 3.0}\n')
    with pytest.raises(DataError, match=r"ledger\.jsonl:2: not "):
        read_ledger(path)


def test_a_stage_that_went_through_is_not_spoken_of() -> None:
    events = history(
        (100, "begin"),
        (110, "attempt"),
        (120, "first_step", {"step": 1}),
        (160, "checkpoint", {"step": 5}),
        (200, "finish", {"step": 10}),
    )
    summary = summarize(events, rows((5, 8.0), (10, 7.0)))
    assert summary == Summary(1, 1, {}, 0, (), 75.0, 100.0)
    assert summary.goodput == 0.75
    assert described(summary.as_dict()) == ""


def test_failures_are_counted_with_what_they_cost() -> None:
    events = history(
        (0, "begin"),
        (1, "attempt", {"from_step": 0}),
        (5, "first_step", {"step": 1}),
        (10, "checkpoint", {"step": 10}),
        (20, "failure", {"cause": "worker_lost", "step": 24}),
        (21, "attempt"),
        (22, "resumed", {"step": 10}),
        (29, "first_step", {"step": 11}),
        (40, "checkpoint", {"step": 30}),
        (41, "failure", {"cause": "preemption", "step": 30}),
        (42, "attempt"),
        (43, "resumed", {"step": 30}),
        (44, "first_step", {"step": 31}),
        (50, "finish", {"step": 40}),
    )
    summary = summarize(events, rows((10, 1.0), (20, 1.5), (40, 1.025)))
    assert summary == Summary(1, 3, {"worker_lost": 1, "preemption": 1}, 14, (9.0, 3.0), 45.5, 50.0)
    assert (
        described(summary.as_dict())
        == "3 attempts: 1 worker lost, 1 preemption; 14 steps again; recovery 6 s (longest 9 s); goodput 91 %"
    )
    assert json.loads(json.dumps(summary.as_dict())) == summary.as_dict()
    assert summary.as_dict()["goodput"] == 0.91


def test_steps_lost_again_on_the_way_back_are_counted_as_often_as_they_were_done() -> None:
    events = history(
        (0, "begin"),
        (1, "first_step", {"step": 1}),
        (2, "failure", {"cause": "error", "step": 24}),
        (3, "first_step", {"step": 11}),
        (4, "failure", {"cause": "error", "step": 15}),
        (5, "first_step", {"step": 11}),
        (6, "finish", {"step": 30}),
    )
    assert summarize(events, []).lost_steps == (24 - 10) + (15 - 10)


def test_failures_before_training_is_under_way_again_are_one_recovery() -> None:
    events = history(
        (0, "begin"),
        (1, "attempt"),
        (2, "first_step", {"step": 1}),
        (10, "failure", {"cause": "node_lost", "step": 8}),
        (11, "attempt"),
        (15, "failure", {"cause": "node_lost", "step": 0}),
        (16, "attempt"),
        (30, "first_step", {"step": 1}),
        (40, "finish", {"step": 9}),
    )
    summary = summarize(events, [])
    assert (summary.failures, summary.lost_steps, summary.recovery_seconds) == ({"node_lost": 2}, 8, (20.0,))
    assert described(summary.as_dict()) == "3 attempts: 2 nodes lost; 8 steps again; recovery 20 s; goodput 0 %"


def test_a_command_that_ended_without_a_word_has_lost_its_driver() -> None:
    events = history(
        (0, "begin"),
        (1, "attempt"),
        (2, "first_step", {"step": 1}),
        (10, "checkpoint", {"step": 6}),
        (1000, "begin", {"step": 9}),
        (1001, "attempt"),
        (1005, "first_step", {"step": 7}),
        (1010, "finish", {"step": 10}),
    )
    summary = summarize(events, rows((6, 1.0), (10, 1.0)))
    assert summary == Summary(2, 2, {"driver_lost": 1}, 3, (995.0,), 10.0, 20.0)
    assert described(summary.as_dict()) == "2 attempts: 1 driver lost; 3 steps again; recovery 17 min; goodput 50 %"
    assert summarize(events[:4], []).failures == {}, "the command may be running still"


@pytest.mark.parametrize(
    ("ending", "failures"),
    [
        (("stop", {"reason": "SIGTERM", "step": 6}), {}),
        (("finish", {"step": 6}), {}),
        (("failure", {"cause": "error", "step": 6}), {"error": 1}),
        (("checkpoint", {"step": 6}), {"driver_lost": 1}),
    ],
)
def test_a_command_that_said_how_it_ended_has_not_lost_its_driver(ending: tuple, failures: dict[str, int]) -> None:
    again = [(100, "begin"), (101, "attempt"), (102, "first_step", {"step": 7}), (103, "finish", {"step": 7})]
    summary = summarize(history((0, "begin"), (1, "attempt"), (2, "first_step", {"step": 1}), (10, *ending), *again), [])
    assert (summary.commands, summary.failures, summary.lost_steps) == (2, failures, 0)
    assert len(summary.recovery_seconds) == len(failures)


def test_a_stop_during_a_recovery_ends_it_uncounted() -> None:
    events = history(
        (0, "begin"),
        (1, "attempt"),
        (2, "first_step", {"step": 1}),
        (3, "failure", {"cause": "hang", "step": 1}),
        (4, "stop", {"reason": "SIGINT", "step": 0}),
        (9000, "begin"),
        (9001, "attempt"),
        (9002, "first_step", {"step": 1}),
        (9003, "finish", {"step": 2}),
    )
    summary = summarize(events, [])
    assert (summary.recovery_seconds, summary.lost_steps, summary.wall_seconds) == ((), 1, 7.0)
    assert described(summary.as_dict()) == "2 attempts: 1 hang; 1 step again; goodput 0 %"


def test_a_resumed_stage_that_nothing_befell_tells_its_attempts() -> None:
    events = history((0, "begin"), (1, "attempt"), (2, "stop"), (3, "begin"), (4, "attempt"), (13, "finish"))
    assert described(summarize(events, rows((3, 2.0))).as_dict()) == "2 attempts; goodput 50 %"


def test_nothing_is_summed_up_as_nothing() -> None:
    summary = summarize([], [])
    assert summary == Summary(0, 0, {}, 0, (), 0.0, 0.0)
    assert summary.goodput == 0.0
    assert described(summary.as_dict()) == ""


def test_a_clock_that_was_set_back_and_rows_after_the_last_event_make_no_nonsense() -> None:
    events = history((100, "begin"), (101, "failure", {"cause": "network"}), (90, "first_step", {"step": 1}), (95, "finish"))
    summary = summarize(events, [])
    assert (summary.recovery_seconds, summary.wall_seconds) == ((0.0,), 0.0)
    assert summarize(history((0, "begin"), (1, "checkpoint")), rows((10, 1.0))).goodput == 1.0


def test_long_recoveries_and_causes_of_a_later_version_can_be_read() -> None:
    summary = Summary(9, 9, {"out_of_memory": 2, "sun_storm": 1}, 0, (30.0, 600.0, 8000.0), 0.0, 1.0)
    assert described(summary.as_dict()) == (
        "9 attempts: 2 times out of memory, 1 sun_storm; recovery 10 min (longest 2.2 h); goodput 0 %"
    )
