"""Data in parts: cut so that nothing is lost, joined to the same bytes whoever made them, and gone on with after a kill."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.contents import DataFile
from orchestrator.data import documents, instructions
from orchestrator.data.choice import Choice, Split
from orchestrator.data.joining import Progress
from orchestrator.data.part import PartMaker, Preparation
from orchestrator.data.prepare import Task, in_this_process, preparation_progress, prepare
from orchestrator.data.rows import PreparedRows
from orchestrator.data.slices import FileSlice, Part, parts_of
from orchestrator.errors import DataError

Write = Callable[[str, str | bytes], DataFile]
PART_BYTES = 1000
LINES = [f"line {number} " + "word " * (number * 7 % 40) for number in range(200)]


def crew_in_any_order(task: Task, preparation: Preparation, workshop: Path, parts: Sequence[Part]) -> Iterator[object]:
    """Two makers by turns, the parts shuffled."""
    makers = [PartMaker(preparation, workshop) for _ in range(2)]
    shuffled = random.Random(1).sample(parts, len(parts))
    for place, part in enumerate(shuffled):
        yield task(makers[place % 2], part)


class Killed(BaseException):
    pass


def killed_after(number: int, made: list[str]) -> Callable[..., Iterator[object]]:
    """A crew that ends as a process does that is killed: nothing is tidied up."""

    def crew(task: Task, preparation: Preparation, workshop: Path, parts: Sequence[Part]) -> Iterator[object]:
        for place, result in enumerate(crew_in_any_order(task, preparation, workshop, parts)):
            if place == number:
                raise Killed
            made.append("part")
            yield result

    return crew


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def texts(rows: PreparedRows) -> list[int]:
    return [int(token) for index in range(len(rows)) for token in rows.row(index).tokens]


@pytest.fixture
def corpus(write: Write, tmp_path: Path) -> tuple[DataFile, ...]:
    """Some of every format, the same number of lines of each."""
    table = pa.Table.from_pylist([{"text": line} for line in LINES])
    pq.write_table(table, tmp_path / "made", row_group_size=16)
    return (
        write("a.txt", "\n".join(LINES)),
        write("b.jsonl", "".join(json.dumps({"text": line}) + "\r\n" for line in LINES)),
        write("c.parquet", (tmp_path / "made").read_bytes()),
        write("d.json", json.dumps([{"text": line} for line in LINES])),
    )


@pytest.fixture
def preparation(corpus: tuple[DataFile, ...], stories: Path) -> Preparation:
    return Preparation("next_token", stories, "text", corpus, block_length=64, part_bytes=PART_BYTES)


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 1000, 10**9])
def test_each_record_is_in_one_slice_wherever_files_are_cut(corpus: tuple[DataFile, ...], part_bytes: int) -> None:
    for file in corpus:
        parts = parts_of("text", [file], part_bytes)
        read = [text for part in parts for piece in part.slices for text in documents.read_slice("text", piece)]
        assert read == LINES, file.name
        if file.name.endswith(".json") or part_bytes == 10**9:
            assert len(parts) == 1
        else:
            assert len(parts) > 3


def test_small_files_share_a_part_and_parts_cover_all_bytes(corpus: tuple[DataFile, ...]) -> None:
    parts = parts_of("text", corpus, 10**6)
    assert [len(part.slices) for part in parts] == [4]
    cut = parts_of("text", corpus, PART_BYTES)
    assert [part.number for part in cut] == list(range(len(cut)))
    assert sum(part.bytes for part in cut) == sum(Path(file.url).stat().st_size for file in corpus) == parts[0].bytes


def test_an_error_in_a_later_part_names_the_line_of_the_file(write: Write) -> None:
    lines = [json.dumps({"text": line}) for line in LINES]
    lines[150] = '{"text": 5}'
    file = write("a.jsonl", "\n".join(lines))
    (*_, last) = parts_of("text", [file], Path(file.url).stat().st_size * 2 // 3)
    with pytest.raises(DataError, match=r'text: a.jsonl:151: "text" is a number'):
        list(documents.read_slice("text", last.slices[0]))
    with pytest.raises(DataError, match=r"instructions: a.jsonl:\d+: has neither"):
        list(instructions.read_slice("instructions", last.slices[0]))


def test_an_error_in_a_later_row_group_names_the_row(write: Write, tmp_path: Path) -> None:
    records = [{"instruction": "Go.", "output": "" if number == 35 else "Gone."} for number in range(40)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "made", row_group_size=10)
    file = write("a.parquet", (tmp_path / "made").read_bytes())
    size = Path(file.url).stat().st_size
    piece = FileSlice(file, size // 2, None, size)
    with pytest.raises(DataError, match=r'instructions: a.parquet: row 36: its "output" is blank'):
        list(instructions.read_slice("instructions", piece))


def test_whoever_makes_the_parts_the_bytes_are_the_same(preparation: Preparation, tmp_path: Path) -> None:
    one = prepare(preparation, tmp_path / "one")
    assert contents(prepare(preparation, tmp_path / "two", crew_in_any_order)) == contents(one)
    assert [path.name for path in (tmp_path / "two").iterdir()] == [one.name]
    assert PreparedRows.open(one).summary.documents == 4 * len(LINES)


def test_no_token_is_lost_where_parts_meet(preparation: Preparation, tmp_path: Path) -> None:
    whole = PreparedRows.open(prepare(replace(preparation, part_bytes=10**9), tmp_path))
    cut = PreparedRows.open(prepare(preparation, tmp_path))
    assert len(cut) > len(whole)
    assert texts(cut) == texts(whole)
    assert (cut.summary.tokens, cut.summary.characters) == (whole.summary.tokens, whole.summary.characters)
    assert cut.summary.targets == sum(cut.num_targets(index) for index in range(len(cut)))


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_killed_preparation_goes_on_with_what_it_has(preparation: Preparation, tmp_path: Path, deduplicate: bool) -> None:
    preparation = replace(preparation, choice=Choice(deduplicate=deduplicate))
    undisturbed = contents(prepare(preparation, tmp_path / "undisturbed"))
    parts = len(preparation.parts())
    made: list[str] = []
    kills = 0
    folder = None
    while folder is None:
        assert len(made) < 3 * parts, "the same parts are made again and again"
        try:
            folder = prepare(preparation, tmp_path / "killed", killed_after(7, made))
        except Killed:
            kills += 1
            # Half of a file that was being written, and a part that another process was at.
            workshop = next(path for path in (tmp_path / "killed").iterdir() if path.is_dir())
            (workshop / f".{parts - 1:06d}-1").mkdir(exist_ok=True)
            if (workshop / "joined.json").is_file():
                with (workshop / "rows" / "tokens.npy").open("ab") as file:
                    file.write(b"half a row")
    assert kills > 3
    assert contents(folder) == undisturbed
    # No part was made twice but those under way.
    assert len(made) <= (2 if deduplicate else 1) * parts
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [folder.name]


def test_progress_is_told_while_parts_are_joined(preparation: Preparation, tmp_path: Path) -> None:
    seen: list[Progress] = []

    def crew(task: Task, preparation: Preparation, workshop: Path, parts: Sequence[Part]) -> Iterator[object]:
        for result in in_this_process(task, preparation, workshop, parts):
            yield result
            found = preparation_progress(preparation, tmp_path)
            assert found is not None
            seen.append(found)

    assert preparation_progress(preparation, tmp_path) is None
    summary = PreparedRows.open(prepare(preparation, tmp_path, crew)).summary
    assert len(seen) == len(preparation.parts())
    assert [found.bytes for found in seen] == sorted({found.bytes for found in seen})
    assert (seen[-1].bytes, seen[-1].documents, seen[-1].tokens) == (seen[-1].total_bytes, summary.documents, summary.tokens)


def test_bad_records_stop_it_or_are_counted(write: Write, preparation: Preparation, tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    bad = write("bad.jsonl", ('{"no": 1}\n' + content + '{"text": \n').encode() + b'{"text": "\xff"}\n{"text": 7}\n')
    preparation = replace(preparation, files=(bad,))
    with pytest.raises(DataError, match=r'text: bad.jsonl:1: has no "text"; it has no'):
        prepare(preparation, tmp_path / "stops")
    # The data's fault is none that another attempt would mend.
    assert not [path for path in (tmp_path / "stops").iterdir() if path.is_dir()]
    skipping = replace(preparation, choice=Choice(bad="skip"))
    summary = PreparedRows.open(prepare(skipping, tmp_path, crew_in_any_order)).summary
    assert (summary.documents, summary.bad) == (len(LINES), 4)
    assert len(summary.complaints) == 3
    assert summary.complaints[0] == 'text: bad.jsonl:1: has no "text"; it has no'
    assert summary.complaints[1].startswith("text: bad.jsonl:202: not JSON")
    assert "without 4 bad records" in str(summary)


def test_copies_are_learned_once_wherever_they_are(write: Write, preparation: Preparation, tmp_path: Path) -> None:
    again = write("e.txt", "\n".join([*LINES[50:60], "new", "new"]))
    files = (*preparation.files, again, again)
    once = replace(preparation, files=files, choice=Choice(deduplicate=True))
    rows = PreparedRows.open(prepare(once, tmp_path, crew_in_any_order))
    assert (rows.summary.documents, rows.summary.duplicates) == (len(LINES) + 1, 3 * len(LINES) + 10 + 1 + 12)
    expected = replace(preparation, files=(preparation.files[0], write("f.txt", "new")), part_bytes=10**9)
    assert texts(rows) == texts(PreparedRows.open(prepare(expected, tmp_path)))
    assert f"without {rows.summary.duplicates} copies" in str(rows.summary)


def test_weights_say_how_often_a_document_is_learned(preparation: Preparation, tmp_path: Path) -> None:
    text, lines = preparation.files[:2]
    weighted = replace(preparation, files=(replace(text, weight=2.5), replace(lines, weight=0.25)), choice=Choice(seed=3))
    summary = PreparedRows.open(prepare(weighted, tmp_path)).summary
    whole = 2 * len(LINES)
    # Which documents a share takes, their own bytes decide: 100 and 50 are expected, give or take three deviations.
    assert whole + 100 + 50 - 40 < summary.documents < whole + 100 + 50 + 40
    other = replace(weighted, choice=Choice(seed=4))
    assert prepare(other, tmp_path) != prepare(weighted, tmp_path)
    twice = replace(preparation, files=(replace(text, weight=2),))
    once = PreparedRows.open(prepare(replace(preparation, files=(text,)), tmp_path))
    rows = PreparedRows.open(prepare(twice, tmp_path, crew_in_any_order))
    assert texts(rows) == texts(once) * 2
    # No whole pass over one file depends on the seed.
    assert prepare(replace(twice, choice=Choice(seed=9)), tmp_path) == prepare(twice, tmp_path)


def test_a_share_is_held_out_with_all_its_copies(preparation: Preparation, tmp_path: Path, tokenizer) -> None:
    def learned(side: str, seed: int = 1) -> list[str]:
        choice = Choice(split=Split(0.2, side), seed=seed)  # type: ignore[arg-type]
        rows = PreparedRows.open(prepare(replace(preparation, choice=choice), tmp_path))
        stream = texts(rows)
        ends = [place for place, token in enumerate(stream) if token == tokenizer.eos_token_id]
        starts = [0, *(end + 1 for end in ends[:-1])]
        return [tokenizer.decode(stream[start + 1 : end]) for start, end in zip(starts, ends, strict=True)]

    kept, held_out = learned("learned"), learned("held_out")
    assert not set(kept) & set(held_out)
    assert len(kept) + len(held_out) == 4 * len(LINES)
    # Each text is there four times, in four formats, and all on one side.
    assert len(held_out) == 4 * len(set(held_out))
    assert 15 < len(set(held_out)) < 65
    assert learned("held_out", seed=2) != held_out


def test_a_killed_preparation_goes_on_where_its_files_have_moved(preparation: Preparation, tmp_path: Path) -> None:
    undisturbed = contents(prepare(preparation, tmp_path / "undisturbed"))
    with pytest.raises(Killed):
        prepare(preparation, tmp_path / "killed", killed_after(len(preparation.parts()) - 2, []))
    moved = []
    for file in preparation.files:
        path = tmp_path / "moved" / file.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(Path(file.url).read_bytes())
        moved.append(DataFile(str(path), file.sha256))
    folder = prepare(replace(preparation, files=tuple(moved)), tmp_path / "killed")
    assert contents(folder) == undisturbed
