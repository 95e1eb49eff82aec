"""What a user sees who mistypes or brings a broken file: one message that says what to do, no traceback, and no worker."""

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.command import run_command
from tests.shared_data import SHARED, needs

GOOD = '{"text": "山里下了一夜的雨。"}\n'
INSTRUCTION = '[{"instruction": "一加一等于几？", "input": "", "output": "等于二。"}]'


def write(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content, encoding="utf-8")
    return name


def message(words: list[str], folder: Path) -> str:
    """What the command prints on stderr; it must fail before anything is started or written."""
    completed = run_command(words, folder, seconds=60)
    assert completed.returncode == 2, completed.stdout + completed.stderr
    assert "Traceback" not in completed.stdout + completed.stderr
    assert "starting Ray" not in completed.stdout
    assert not list(folder.glob("runs/*-????????????"))
    return completed.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stages.attention.learnin_rate=1e-4"], ["learnin_rate", "did you mean learning_rate?"]),
        (
            ["+stages.attention.method.rnk=4"],
            ["attention.method.rnk", "did you mean rank?", "+stages.attention.method.rnk=4"],
        ),
        (["++stge=2"], ["stge", "did you mean stage?"]),
        (["recipe=chinese_lama"], ["did you mean chinese_llama?", "chinese_llama_published"]),
        (["stage=7"], ["no stage 7", "0 vocabulary", "4 export"]),
        (["stage=atention"], ["did you mean attention?"]),
        (["stages.attention.method.targets=[q_prog]"], ["q_prog names no linear layer", "down_proj, gate_proj", "v_proj"]),
        (["workers=3"], ["global_batch_size 16", "micro_batch_size 4 x 3 workers = 12"]),
        (["base_model=nowhere"], ["base_model: nowhere is no folder"]),
        (["text=nothing.jsonl"], ["text: nothing.jsonl is no file, folder or pattern that matches"]),
        (["text=nothing.jsonl", "validation=neither.txt"], ["nothing.jsonl", "neither.txt"]),
        (["scale=7b", "base_model=nowhere"], ["text: is empty", "instructions: is empty", "nowhere"]),
    ],
)
def test_a_mistyped_word_is_explained(words: list[str], expected: list[str], tmp_path: Path) -> None:
    shown = message(words, tmp_path)
    for part in expected:
        assert part in shown


def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    name = write(tmp_path, "corpus.jsonl", GOOD + '{"text": "坏了\n')
    assert "corpus.jsonl:2: not JSON" in message([f"text={name}"], tmp_path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    name = write(tmp_path, "empty.txt", "")
    assert "empty.txt is empty" in message([f"text={name}"], tmp_path)


def test_an_instruction_without_output_is_found_before_the_stages_before_it_train(tmp_path: Path) -> None:
    records = json.loads(INSTRUCTION)
    name = write(tmp_path, "tasks.json", json.dumps([*records, {"instruction": "二加二？", "input": ""}]))
    shown = message([f"instructions={name}", "stage=all"], tmp_path)
    assert "tasks.json: record 2" in shown
    assert "output" in shown


@needs("stories260k")
def test_a_base_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(SHARED / "stories260k", base, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "has no tokenizer" in message(["base_model=base"], tmp_path)


@needs("stories260k")
def test_a_vocabulary_smaller_than_the_tokenizer_is_refused_with_both_numbers(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(SHARED / "stories260k", base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").chmod(0o644)
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 500}), encoding="utf-8")
    shown = message(["base_model=base"], tmp_path)
    assert "500 rows" in shown
    assert "512 tokens" in shown


@pytest.mark.ray
@pytest.mark.slow
def test_more_workers_than_the_machine_has_are_refused_with_what_it_can_give(tmp_path: Path) -> None:
    batches = [f"stages.{name}.global_batch_size=4096" for name in ("embeddings", "attention", "instruct")]
    completed = run_command(["workers=1024", *batches], tmp_path, seconds=120)
    assert completed.returncode == 2
    assert "Traceback" not in completed.stderr
    assert "workers: 1024 of {'CPU': 1} are more than this cluster can give" in completed.stderr
    assert not list(tmp_path.glob("runs/*-????????????"))


def test_a_run_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "taken", "a file, not a folder")
    assert "run_root" in message(["run_root=taken"], tmp_path)
