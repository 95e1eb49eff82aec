"""What a worker holds, from sizes alone: the published log, and what must hold between levels and settings."""

from dataclasses import replace

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from orchestrator.plan.memory import Memory, Placed, largest_micro_batch, memory
from orchestrator.plan.shape import Learned, ModelShape
from orchestrator.schema import TrainStage

SEVEN = ModelShape(4096, 11008, 32, 32, 32, 128, 49_953)
LEARNED = 429_203_456
"""LoRA of rank 8 on all linear layers, embedding and head."""
LEARNS = Learned(LEARNED, LEARNED - 2 * SEVEN.table, LEARNED - 2 * SEVEN.table, True, 2 * SEVEN.table)
STAGE = TrainStage.model_validate(
    {
        "kind": "train",
        "objective": "next_token",
        "block_length": 512,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "global_batch_size": 64,
        "steps": 1,
        "learning_rate": 1e-4,
    }
)


def of(stage: TrainStage = STAGE, **placed) -> Memory:
    return memory(SEVEN, LEARNS, stage, replace(Placed(2, 1, 4, "fp16"), **placed))


def test_the_published_log() -> None:
    # Chinese-LLaMA's notebook, one GPU, ZeRO-2, fp16: 17.69 GB (2^30) held once the optimizer was there.
    held = of()
    assert (held.weights + held.optimizer) / 2**30 == pytest.approx(17.69, rel=0.003)


def test_each_level_of_zero_cuts_up_more() -> None:
    levels = [of(zero=zero, workers=8) for zero in (0, 1, 2, 3)]
    totals = [each.total for each in levels]
    assert totals == sorted(totals, reverse=True)
    assert levels[1].optimizer == levels[0].optimizer / 8
    assert (levels[1].gradients, levels[2].gradients) == (levels[0].gradients, levels[0].gradients / 8)
    assert levels[3].weights < levels[2].weights / 4


def test_what_takes_less() -> None:
    whole = of()
    eight_bits = of(STAGE.model_copy(update={"optimizer": "adamw_8bit"}))
    # Masters of four bytes stay.
    assert eight_bits.optimizer == pytest.approx(whole.optimizer * 6.03 / 12)
    checkpointing = STAGE.model_validate(STAGE.model_dump() | {"resources": {"gradient_checkpointing": True}})
    assert of(checkpointing).activations < whole.activations / 8
    quantized = STAGE.model_validate(STAGE.model_dump() | {"quantization": "nf4"})
    assert whole.weights - of(quantized).weights == pytest.approx(SEVEN.body * (16 - 4.127) / 8)
    assert of(micro_batch=2).activations == whole.activations / 2


def test_the_largest_micro_batch_is_one_that_fits_and_divides() -> None:
    placed, limit = Placed(2, 1, 4), 40e9
    most = largest_micro_batch(SEVEN, LEARNS, STAGE, placed, limit)
    assert 64 % most == 0
    assert memory(SEVEN, LEARNS, STAGE, replace(placed, micro_batch=most)).total <= limit
    assert memory(SEVEN, LEARNS, STAGE, replace(placed, micro_batch=2 * most)).total > limit
    assert largest_micro_batch(SEVEN, LEARNS, STAGE, placed, 10e9) == 0


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_deepspeeds_own_estimators_agree_where_everything_learns(workers: int) -> None:
    parameters = SEVEN.parameters
    learns = Learned(parameters, 0, SEVEN.body, True, parameters)
    stage = STAGE.model_validate(STAGE.model_dump() | {"method": "full", "modules_to_save": []})
    two, three = (memory(SEVEN, learns, stage, Placed(zero, workers, 4, on_gpu=False)) for zero in (2, 3))
    _, estimated = estimate_zero2_model_states_mem_needs(parameters, workers, cpu_offload=False)
    assert two.weights + two.gradients + two.optimizer == pytest.approx(estimated, rel=1e-6)
    _, estimated, layer = estimate_zero3_model_states_mem_needs(
        parameters, SEVEN.table, workers, cpu_offload=False, cpu_offload_params=False
    )
    # They count the largest layer in four bytes, and what is gathered here has the run's two. Weights and gradients are two
    # bytes each, of which their 18 leave out one pair.
    gathered = max(SEVEN.table, SEVEN.body // SEVEN.layers) * 2
    state = three.weights - gathered + three.gradients + three.optimizer
    assert state == pytest.approx(estimated - layer + 2 * parameters / workers, rel=1e-6)
    # On a GPU gradients in fp32 take what the activations had, and are not counted.
    on_gpu = memory(SEVEN, learns, stage, Placed(2, workers, 4))
    assert two.gradients - on_gpu.gradients == pytest.approx(4 * parameters / workers)
