"""Parts made by Ray Data on all cores of the cluster, as a stream: what is done comes at once, and little is on its way."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.data.part import PartMaker, Preparation
from orchestrator.data.prepare import IDLE_CPUS, Crew, Task, in_this_process
from orchestrator.data.slices import Part
from orchestrator.errors import DataError, ModelError, OrchestratorError

_ERRORS: dict[str, type[OrchestratorError]] = {kind.__name__: kind for kind in (DataError, ModelError)}
"""What may be wrong with the data; everything else is our mistake."""


WORTH_BYTES = 1 << 26
"""Less is prepared by one process on all cores of its node before others have started."""


def on_ray(only_here: bool, worth_bytes: int = WORTH_BYTES) -> Crew:
    """A crew of one process a core, on this node alone where the others do not see its files."""

    def crew(task: Task, preparation: Preparation, workshop: Path, parts: Sequence[Part]) -> Iterator[object]:
        workers = min(len(parts), _cores(only_here))
        if workers < 2 or sum(part.bytes for part in parts) < worth_bytes:
            yield from in_this_process(task, preparation, workshop, parts)
            return
        import ray.data  # noqa: PLC0415  takes seconds

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # A block for each, so that any process may take it. These are there at once, where those of `range` would be made by
        # tasks that ask for a whole core, and wait for ever on a small cluster.
        numbers = ray.data.from_items([{"number": number} for number in range(len(parts))], override_num_blocks=len(parts))
        done = numbers.map(
            cast("Any", _Maker),
            fn_constructor_args=(task, preparation, workshop, parts),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1 - IDLE_CPUS,
            **_placed(only_here),
        )
        for row in done.iter_rows():
            if row["error"]:
                raise _ERRORS[row["error"]](row["message"])
            yield None

    return crew


class _Maker:
    """One process of the crew."""

    def __init__(self, task: Task, preparation: Preparation, workshop: Path, parts: Sequence[Part]) -> None:
        # One core each: a tokenizer that takes all of them takes them from the others.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._task, self._maker, self._parts = task, PartMaker(preparation, workshop), parts

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            self._task(self._maker, self._parts[row["number"]])
        except tuple(_ERRORS.values()) as error:
            # As a row: Ray would take an error for a lost process's, and try again.
            return {"error": type(error).__name__, "message": str(error)}
        return {"error": "", "message": ""}


def _cores(only_here: bool) -> int:
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and (node["NodeID"] == here or not only_here)]
    return sum(int(node["Resources"].get("CPU", 0)) for node in nodes)


def _placed(only_here: bool) -> dict[str, Any]:
    if not only_here:
        return {}
    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
