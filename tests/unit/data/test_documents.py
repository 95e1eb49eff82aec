"""Documents and records from every format, and what is said when one is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.contents import DataFile
from orchestrator.data.documents import check_documents, read_documents
from orchestrator.errors import DataError

# A document may hold what Python calls a line end (U+2028), and the next is blank.
TEXTS = ["白日依山尽，黄河入海流。", "  two words\u2028and more ", "x"]


def message_of(file: DataFile) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents("text", [file]))
    return str(caught.value)


def as_parquet(path: Path, **columns: list) -> bytes:
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


def test_every_format_gives_the_same_documents(write, tmp_path):
    records = [{"title": "t", "text": text} for text in [*TEXTS, " \n"]]
    files = [
        write("a.jsonl", "\n\n".join(json.dumps(record) for record in records)),
        write("bom.jsonl", b"\xef\xbb\xbf" + "\r\n".join(json.dumps(record) for record in records).encode()),
        write("a.json", json.dumps(records, indent=1)),
        write("strings.json", json.dumps(TEXTS)),
        write("a.txt", "\n".join([*TEXTS, "", "  "])),
        write("windows.txt", "\r\n".join(TEXTS)),
        write("a.parquet", as_parquet(tmp_path / "made", text=[*TEXTS, ""], title=["t"] * 4)),
    ]
    for file in files:
        assert list(read_documents("text", [file])) == TEXTS, file.name
    assert check_documents("text", files).documents == 3 * len(files)
    assert check_documents("text", files[:2]).characters == 2 * sum(map(len, TEXTS))


def test_documents_behind_a_url_are_read():
    import fsspec  # noqa: PLC0415

    fsspec.filesystem("memory").pipe("/corpus/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    assert list(read_documents("text", [DataFile("memory://corpus/a.jsonl", "")])) == ["one", "two"]


def test_documents_are_streamed(write):
    documents = read_documents("text", [write("a.jsonl", '{"text": "good"}\nbad')])
    assert next(documents) == "good"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "y',
            "text: a.jsonl:2: not JSON (Unterminated string starting at: column 10); fix or remove the line",
        ),
        ("a.jsonl", '{"text": "x"}\n\n{"title": "t", "body": "b"}', 'text: a.jsonl:3: has no "text"; it has title, body'),
        ("a.jsonl", "{}", 'text: a.jsonl:1: has no "text"; it has no keys at all'),
        ("a.jsonl", '{"text": 12}', 'text: a.jsonl:1: "text" is a number; it must be text'),
        ("a.jsonl", "[1]", 'text: a.jsonl:1: "text" is a list; it must be text'),
        (
            "a.jsonl",
            '{"text": "ab\\ud83d"}',
            'text: a.jsonl:1: "text" has half a character (\\ud83d) at position 2; remove it, or write both halves',
        ),
        ("a.jsonl", "", "text: a.jsonl holds no document; add text to it, or leave it out"),
        ("a.txt", "\n  \n", "text: a.txt holds no document; add text to it, or leave it out"),
        ("a.txt", b"ab\n\xb0\xd7", "text: a.txt:2: not UTF-8 (byte 0xb0); convert the file, e.g. with iconv -t UTF-8"),
        ("a.json", "", "text: a.json holds no document; add text to it, or leave it out"),
        ("a.json", "[]", "text: a.json holds no document; add text to it, or leave it out"),
        ("a.json", '["x",\n"y"', "text: a.json:2: not JSON (Expecting ',' delimiter: column 4); fix the file"),
        (
            "a.json",
            '{"text": "x"}\n{"text": "y"}',
            "text: a.json:2: not JSON (Extra data: column 1); with one object on each line, name it .jsonl",
        ),
        ("a.json", '{"text": "x"}', "text: a.json: holds an object; a .json file must hold one list of records"),
        ("a.json", '["x", null]', 'text: a.json: record 2: "text" is null; it must be text'),
        ("a.json", b'["\xff"]', "text: a.json: not UTF-8 (byte 0xff); convert the file, e.g. with iconv -t UTF-8"),
    ],
)
def test_a_bad_file_is_named_with_its_line(write, name, content, message):
    assert message_of(write(name, content)) == message


def test_a_bad_parquet_file_is_named(write, tmp_path):
    other = as_parquet(tmp_path / "made", title=["t"], body=["b"])
    assert message_of(write("a.parquet", other)) == 'text: a.parquet: has no column "text"; it has title, body'
    null = as_parquet(tmp_path / "made", text=["x", None])
    assert message_of(write("a.parquet", null)) == 'text: a.parquet: row 2: "text" is null; it must be text'
    message = message_of(write("a.parquet", null[:-3]))
    assert message.startswith("text: a.parquet: not Parquet (")
    assert message.endswith("; fetch or write the file again")


def test_a_file_that_is_gone_is_named(tmp_path):
    message = message_of(DataFile(f"{tmp_path}/gone.jsonl", ""))
    assert message == f"text: gone.jsonl: no such file any more; it was at {tmp_path}/gone.jsonl"


def test_reading_needs_neither_torch_nor_transformers_nor_pyarrow():
    heavy = "{'torch', 'transformers', 'tokenizers', 'pyarrow', 'numpy'}"
    code = f"import sys, orchestrator.data.documents, orchestrator.data.instructions; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_published_text_is_read(shared):
    counts = check_documents("text", [DataFile(str(shared / "text" / "luxun_train.jsonl"), "")])
    assert (counts.documents, counts.characters) == (626, 1_262_951)
    assert check_documents("text", [DataFile(str(shared / "text" / "english_wikipedia_30.txt"), "")]).documents == 30
