"""What a method costs once it is trained: the time that a model takes for each token that it writes."""

import statistics
import time
from pathlib import Path
from typing import Any, cast

import torch

from orchestrator.model.adapters import load_adapter
from orchestrator.model.loading import load_model

_PROMPT_TOKENS = 16
_TIMES = 5


def run_latency(base: Path, adapter: Path | None, can_merge: bool, precision: str, tokens: int) -> dict[str, float]:
    """Seconds per token, one sample at a time: `adapted`, and `merged` where that can be; without an adapter `plain`."""
    model = load_model(base, precision).eval()
    if adapter is None:
        return {"plain": _seconds(model, tokens)}
    adapted = load_adapter(model, adapter).eval()
    found = {"adapted": _seconds(adapted, tokens)}
    if can_merge:
        found["merged"] = _seconds(cast(Any, adapted).merge_and_unload(), tokens)
    return found


@torch.no_grad()
def _seconds(model: Any, tokens: int) -> float:
    """The median of a few tries, after one that is not counted."""
    ids = torch.arange(1, 1 + _PROMPT_TOKENS)[None]
    wanted = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    taken = []
    for _ in range(_TIMES + 1):
        started = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **wanted)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:]) / tokens
