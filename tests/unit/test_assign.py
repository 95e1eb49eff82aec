"""What a stage is told about the stages before it."""

from dataclasses import replace
from pathlib import Path

from orchestrator.assign import reference
from orchestrator.compose import compose
from orchestrator.plan.plan import Contents, Plan, make_plan
from orchestrator.plan.record import Record
from orchestrator.stages.assignment import HeldOut
from tests.llama_layers import LAYERS

RESULTS = {"held_out": {"validation": {"before": {"bits_per_character": 5.0}, "after": {"bits_per_character": 4.0}}}}
SAME = HeldOut("validation", Path("/anywhere/data-aaaaaaaaaaaa"))


def plan_with(reference_of_embeddings: dict) -> Plan:
    data: dict[str, str] = dict.fromkeys(("vocabulary", "embeddings", "attention", "instruct"), "d" * 64)
    contents = Contents("b" * 64, "c" * 64, data, linear_layers=LAYERS)
    plan = make_plan(compose(["stage=2"]), contents, Path("/nowhere"))
    done = plan.named("embeddings")
    results = {"reference": {"validation": reference_of_embeddings}}
    record = Record(done.name, "train", done.fingerprint, done.identity, done.parents, {}, results, {})
    return plan.with_record("embeddings", replace(record, finished=1.0))


def test_the_base_models_numbers_are_passed_on_from_stage_to_stage() -> None:
    base = {"bits_per_character": 9.0, "data": "data-aaaaaaaaaaaa"}
    plan = plan_with(base)
    assert reference(plan, plan.named("attention"), RESULTS, [SAME]) == {"validation": base}


def test_another_held_out_text_is_not_compared_with_the_old_ones_numbers() -> None:
    plan = plan_with({"bits_per_character": 9.0, "data": "data-bbbbbbbbbbbb"})
    found = reference(plan, plan.named("attention"), RESULTS, [SAME])
    assert found["validation"] == {"bits_per_character": 5.0, "data": "data-aaaaaaaaaaaa"}


def test_the_first_training_stage_measures_the_base_itself() -> None:
    plan = plan_with({})
    found = reference(plan, plan.named("embeddings"), RESULTS, [SAME])
    assert found["validation"]["bits_per_character"] == 5.0
