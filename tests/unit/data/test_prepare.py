"""Prepared data: what the rows hold, what they depend on, and that a folder is whole or absent."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from orchestrator.contents import DataFile, find_data
from orchestrator.data import objectives
from orchestrator.data.documents import read_documents
from orchestrator.data.part import Preparation
from orchestrator.data.prepare import Task, in_this_process, prepare, prepared_key
from orchestrator.data.rows import PreparedRows
from orchestrator.data.slices import Part
from orchestrator.data.tokenizer import load_tokenizer, text_ids
from orchestrator.errors import DataError, ModelError, RecipeError

BEGIN, END = 1, 2


@pytest.fixture
def text(shared: Path, stories: Path) -> Preparation:
    """25 real essays, 22 K characters."""
    files = find_data("text", [str(shared / "text" / "luxun_validation.jsonl")])
    return Preparation("next_token", stories, "text", files, block_length=64)


@pytest.fixture
def answers(shared: Path, stories: Path) -> Preparation:
    files = find_data("instructions", [str(shared / "instructions" / "alpaca_en_demo.json")])
    return Preparation("answers", stories, "instructions", files, block_length=256)


def rows_of(preparation: Preparation, run_root: Path) -> PreparedRows:
    return PreparedRows.open(prepare(preparation, run_root))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_no_token_of_the_text_is_lost(text, tmp_path, tokenizer):
    rows = rows_of(text, tmp_path)
    documents = list(read_documents("text", text.files))
    stream = [token for ids in text_ids(tokenizer, documents) for token in (BEGIN, *ids, END)]
    assert np.concatenate([rows.row(index).tokens for index in range(len(rows))]).tolist() == stream
    lengths = [len(rows.row(index).tokens) for index in range(len(rows))]
    assert set(lengths[:-1]) == {64}
    assert 2 <= lengths[-1] <= 64
    assert all(rows.row(index).loss_mask.all() for index in range(len(rows)))
    assert (rows.summary.documents, rows.characters) == (25, sum(map(len, documents)))
    assert rows.summary.tokens == len(stream)
    assert rows.summary.fill_rate == pytest.approx(len(stream) / len(rows) / 64)


def test_the_size_of_tokenizer_batches_changes_no_byte(text, tmp_path, monkeypatch):
    whole = contents(prepare(text, tmp_path / "whole"))
    monkeypatch.setattr(objectives, "BATCH_CHARACTERS", 1000)
    assert contents(prepare(text, tmp_path / "small")) == whole


@pytest.mark.parametrize("spare", range(9))
def test_no_row_is_a_single_token_that_nothing_predicts(write, tmp_path, without_bos, spare):
    letters = "a" * (15 + spare)
    preparation = Preparation("next_token", without_bos, "text", (write("a.txt", letters),), block_length=8)
    rows = rows_of(preparation, tmp_path / "runs")
    assert np.diff(rows.offsets).min() >= 2
    assert np.diff(rows.offsets).max() <= 8
    assert rows.tokens.tolist() == [rows.tokens[0]] * len(letters) + [256]
    assert rows.targets.tolist() == [length - 1 for length in np.diff(rows.offsets)]


def test_every_answer_ends_in_a_learned_end_token_and_no_prompt_is_learned(answers, tmp_path, tokenizer):
    rows = rows_of(answers, tmp_path)
    assert len(rows) == rows.summary.documents == 999
    cut = 0
    for index in range(len(rows)):
        tokens, loss_mask, _ = rows.row(index)
        assert tokens[0] == BEGIN
        assert tokens[-1] == END
        first = int(np.argmax(loss_mask))
        assert loss_mask[first:].all()
        assert rows.num_targets(index) == len(tokens) - first > 0
        assert first >= 256 // 4
        assert tokenizer.decode(tokens[:first]).endswith("### Response: ")
        cut += len(tokens) == 256
    assert cut >= rows.summary.truncated > 100
    assert rows.summary.targets == rows.targets.sum()


def test_held_out_windows_count_every_token_once(text, tmp_path, tokenizer):
    rows = rows_of(dataclasses.replace(text, objective="held_out"), tmp_path)
    seen = []
    for index in range(len(rows)):
        tokens, loss_mask, _ = rows.row(index)
        assert len(tokens) <= 64
        assert tokens[0] == BEGIN
        assert loss_mask.tolist() == [False] + [True] * (len(tokens) - 1)
        seen.extend(tokens[loss_mask])
    documents = list(read_documents("text", text.files))
    ids = text_ids(tokenizer, documents)
    assert seen == [token for document in ids for token in document]
    assert rows.summary.targets == len(seen)
    assert rows.characters == sum(map(len, documents))
    # No window reaches over the end of a document.
    assert len(rows) == sum(-(-len(document) // 63) for document in ids)


def test_a_tokenizer_without_begin_token_starts_held_out_text_with_its_end_token(write, tmp_path, without_bos):
    assert load_tokenizer(without_bos).bos_token_id is None
    held_out = Preparation("held_out", without_bos, "validation", (write("a.txt", "abc\nd"),), block_length=8)
    rows = rows_of(held_out, tmp_path / "runs")
    assert rows.tokens[rows.offsets[:-1]].tolist() == [256, 256]
    assert rows.targets.tolist() == [3, 1]
    record = json.dumps([{"instruction": "Go.", "output": "Gone."}])
    rows = rows_of(dataclasses.replace(held_out, objective="answers", files=(write("a.json", record),)), tmp_path / "runs")
    assert rows.tokens.tolist().count(256) == 1


def test_a_tokenizer_that_cannot_end_a_text_is_refused(without_bos, tmp_path):
    folder = shutil.copytree(without_bos, tmp_path / "endless")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its tokenizer has no end-of-text token; set eos_token in tokenizer_config.json"):
        load_tokenizer(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty holds no tokenizer that transformers can load"):
        load_tokenizer(tmp_path / "empty")


def test_what_is_prepared_is_reused_at_once_and_gives_the_same_bytes_anywhere(text, tmp_path):
    folder = prepare(text, tmp_path)
    assert folder == tmp_path / f"data-{prepared_key(text)}"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(text, tmp_path, nobody) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert contents(prepare(text, tmp_path / "elsewhere")) == contents(folder)
    written = json.loads((folder / "data.json").read_text())
    for name, array in written["arrays"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == array["sha256"]


def test_the_key_follows_content_and_nothing_else(text, answers, without_bos, tmp_path):
    assert len(prepared_key(text)) == 12
    changed = [
        dataclasses.replace(text, block_length=65),
        dataclasses.replace(text, tokenizer=without_bos),
        dataclasses.replace(text, objective="held_out"),
        dataclasses.replace(text, files=(DataFile(text.files[0].url, "1" * 64),)),
        dataclasses.replace(text, files=text.files * 2),
        answers,
        dataclasses.replace(answers, template="chat"),
    ]
    assert len({prepared_key(preparation) for preparation in (text, *changed)}) == len(changed) + 1
    moved = DataFile("elsewhere/a.jsonl", text.files[0].sha256)
    copied = shutil.copytree(text.tokenizer, tmp_path / "copied")
    assert prepared_key(dataclasses.replace(text, files=(moved,), field="other", tokenizer=copied)) == prepared_key(text)
    # Text knows no template.
    assert prepared_key(dataclasses.replace(text, template="chat")) == prepared_key(text)


@pytest.mark.parametrize("damage", ["no summary", "torn summary", "short array", "no array"])
def test_half_a_folder_is_not_taken_as_complete(text, tmp_path, damage):
    folder = prepare(text, tmp_path)
    whole = contents(folder)
    if damage == "no summary":
        (folder / "data.json").unlink()
    elif damage == "torn summary":
        (folder / "data.json").write_bytes(whole["data.json"][:100])
    elif damage == "short array":
        (folder / "tokens.npy").write_bytes(whole["tokens.npy"][:-1])
    else:
        (folder / "offsets.npy").unlink()
    with pytest.raises(DataError, match="is no complete prepared data; delete it, and the next run prepares it again"):
        PreparedRows.open(folder)
    assert contents(prepare(text, tmp_path)) == whole
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def nobody(task: Task, preparation: Preparation, workshop: Path, parts: Sequence[Part]) -> Iterator[object]:
    """A crew that must not be called."""
    raise AssertionError("somebody was to prepare what is there")


def test_two_that_prepare_the_same_at_once_get_the_same_folder(text, tmp_path):
    asked: list[int] = []
    waited: list[Future[Path]] = []

    def waiting(task: Task, preparation: Preparation, workshop: Path, parts: Sequence[Part]) -> Iterator[object]:
        asked.append(len(parts))
        second = pool.submit(prepare, text, tmp_path, nobody)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.3)
        waited.append(second)
        return in_this_process(task, preparation, workshop, parts)

    with ThreadPoolExecutor(1) as pool:
        first = prepare(text, tmp_path, waiting)
        assert waited[0].result(timeout=30) == first
    assert asked == [1]
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert contents(first) == contents(prepare(text, tmp_path / "alone"))


def test_a_tiny_block_is_refused(text, tmp_path):
    with pytest.raises(RecipeError, match="block_length 7 is too short; give at least 8 tokens"):
        prepare(dataclasses.replace(text, block_length=7), tmp_path)
