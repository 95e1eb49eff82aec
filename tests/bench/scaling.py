"""What the workers of a large run send each other, and how it should scale: from formulas, on paper.

    python -m tests.bench.scaling

LLaMA-7B with 49,953 tokens, LoRA of rank 8 on attention with embedding and head, the budget of `scale=7b`: 1,024 sequences
of 512 a step, micro-batches of at most 8, gradient checkpointing, bf16. tests/parity/test_traffic.py counts such bytes.
"""

from typing import Literal, get_args

from orchestrator.plan.traffic import Sizes, step_traffic

HIDDEN, LAYERS, VOCABULARY, MLP, RANK = 4096, 32, 49_953, 11_008, 8
SEQUENCES, BLOCK, MICRO_BATCH = 1024, 512, 8
Zero = Literal[0, 1, 2, 3]

DEVICE_FLOPS = 989e12 * 0.4
"""Of an H100 in bf16, 40 % of the datasheet's peak."""
FAST_LINK, SLOW_LINK = 450e9, 50e9
"""Bytes per second that a device sends: NVLink within a node of eight, 400 Gb/s InfiniBand between nodes."""

TABLES = 2 * VOCABULARY * HIDDEN
BODY = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP + 2 * HIDDEN) + HIDDEN
LORA = LAYERS * 4 * RANK * 2 * HIDDEN
SIZES = Sizes(trainable=TABLES + LORA, total=TABLES + LORA + BODY)


def compute_seconds(workers: int) -> float:
    """Of a step: 6N for each token, since checkpointing runs the forward again and the frozen weights have no gradient."""
    flops = SEQUENCES * BLOCK * (6 * (BODY + TABLES / 2) + 2 * SIZES.trainable)
    return flops / workers / DEVICE_FLOPS


def row(zero: Zero, workers: int) -> str:
    accumulation = max(1, SEQUENCES // (workers * MICRO_BATCH))
    sent = step_traffic(zero, SIZES, accumulation).sent(workers)
    computing, sending = compute_seconds(workers), sent / (FAST_LINK if workers <= 8 else SLOW_LINK)
    alone, beside = computing / (computing + sending), computing / max(computing, sending)
    return (
        f"| {workers} | {zero} | {accumulation} | {sent / 1e9:.1f} GB | {computing:.2f} s | {sending:.2f} s | "
        f"{alone:.0%} to {beside:.0%} |"
    )


def table() -> str:
    """For each number of devices and ZeRO level; the efficiency without any overlap, and with as much as there can be."""
    heading = (
        "| devices | ZeRO | micro-batches | sent by each | computing | sending | efficiency |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([heading, *(row(zero, workers) for workers in (8, 64, 512) for zero in get_args(Zero))])


if __name__ == "__main__":
    print(f"{SIZES.trainable / 1e6:,.1f} of {SIZES.total / 1e6:,.1f} million parameters learn")
    print(table())
