"""What the processes of test_worker.py do. Each of them reads this file, so it imports little."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from orchestrator.errors import RecipeError
from orchestrator.train.link import Link


def say_and_return(assignment: Any, link: Link) -> tuple[Any, int]:
    """The assignment, and the sum of all ranks plus one each."""
    link.beat(0, "loading")
    link.note({"event": "first"})
    print("said to stdout")
    print("said to stderr", file=sys.stderr)
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    link.beat(7, "computing")
    link.note({"event": "second", "step": 7})
    return assignment, int(total)


def memory_is_short(assignment: Any, link: Link) -> int:
    """How readily the kernel ends this process then, of -1000 to 1000."""
    return int(Path("/proc/self/oom_score_adj").read_text())


def process_and_parent(assignment: Any, link: Link) -> tuple[int, int]:
    return os.getpid(), os.getppid()


def fail(how: str, link: Link) -> None:
    match how:
        case "ours":
            raise RecipeError(["q_prog names no linear layer", "and there is more"]) from KeyError(threading.Lock())
        case "memory":
            raise MemoryError("of the host")
        case "memory of torch":
            torch.empty(1 << 60)
        case "memory of a GPU":
            raise torch.OutOfMemoryError("CUDA out of memory")
        case "other":
            raise ValueError("what nobody foresaw")
        case "exit":
            sys.exit("a vendor's opinion")


class Unreadable(Exception):
    """Can be pickled, but not read again."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def return_what_does_not_travel(how: str, link: Link) -> object:
    return threading.Lock() if how == "pickling" else Unreadable(1, 2)


def return_much(num_bytes: int, link: Link) -> bytes:
    for step in range(1000):
        link.beat(step, "computing")
    return bytes(num_bytes)


def leave(code: int, link: Link) -> None:
    print("on its way out", end="")
    os._exit(code)


def multiply_many_shapes(count: int, link: Link) -> int:
    """By how many bytes the process grew."""
    right = torch.ones(64, 64, dtype=torch.bfloat16)
    torch.ones(8, 64, dtype=torch.bfloat16) @ right
    before = psutil.Process().memory_info().rss
    for rows in range(100, 100 + count):
        torch.ones(rows, 64, dtype=torch.bfloat16) @ right
    return psutil.Process().memory_info().rss - before


def wait_to_be_asked(assignment: Any, link: Link) -> str:
    link.note({"event": "waiting", "pid": os.getpid()})
    while not link.should_stop():
        time.sleep(0.01)
    return "was asked"


def hang(assignment: Any, link: Link) -> None:
    link.beat(3, "computing")
    a_function_that_hangs(link)


def a_function_that_hangs(link: Link) -> None:
    # From here, so that whoever hears it finds the process here.
    link.note({"event": "waiting", "pid": os.getpid()})
    threading.Event().wait()


def leave_a_child_behind(assignment: Any, link: Link) -> None:
    """Dies after it has started a process that keeps all that it could inherit."""
    if (pid := os.fork()) == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"])
    link.note({"event": "child", "pid": pid})
    os._exit(4)
