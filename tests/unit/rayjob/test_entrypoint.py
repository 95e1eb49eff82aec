"""The words of a command go through two shells and Ray's own joining, and arrive as they were."""

import random
import shlex
import subprocess

import pytest

from orchestrator.rayjob.entrypoint import entrypoint_of

_PRINT = "python3 -c 'import sys; sys.stdout.write(chr(0).join(sys.argv[1:]))'"


def arrived(words: list[str]) -> list[str]:
    """As KubeRay's submitter script, `ray job submit` and Ray's job server pass them on, one after the other."""
    first = ["bash", "-c", f"{_PRINT} -- {entrypoint_of(words)}"]
    given = subprocess.run(first, capture_output=True, text=True, check=True).stdout.split("\0")[1:]
    second = f"{_PRINT} {subprocess.list2cmdline(given)}"
    return subprocess.run(second, shell=True, capture_output=True, text=True, check=True).stdout.split("\0")


@pytest.mark.parametrize(
    "word",
    [
        "stage=2",
        "text=https://host/corpus?part=1&sort=a",
        "name=it's",
        "cluster.labels.pool=in(old,new)",
        'text=["a b.jsonl", "c.jsonl"]',
        'text=["a.jsonl","c.jsonl"]',
        "stages.attention.method={kind: lora, targets: [q_proj], rank: 4}",
        "run_root=$HOME/runs",
        "run root=$HOME/`date`",
        "text=data/*.jsonl",
        "name=語言 模型",
        "name=",
        "",
        r"path=C:\data\new",
        r"path=C:\my data\new" + "\\",
        r"quote=\"a\" b",
        r"two=\\$x \\",
        "note=#1 ~ {a,b} !x ^y|z;w<v>u",
        "note=#1~{a,b}!x^y|z;w<v>u",
        "tab=a\tb",
    ],
)
def test_a_word_arrives_as_it_was(word: str) -> None:
    assert arrived([word, "last"]) == [word, "last"]


def test_all_that_a_keyboard_has_arrives() -> None:
    generator = random.Random(1)
    characters = [chr(code) for code in range(32, 127)] + ["\t"] + list("\\\\\"\"'' ")
    words = ["".join(generator.choices(characters, k=generator.randint(0, 12))) for _ in range(2000)]
    assert arrived(words) == words


def test_ordinary_words_stand_as_they_are_typed() -> None:
    words = ["python", "launch/run.py", "recipe=chinese_llama", "stage=2", "cluster.nodes=2-4", "run_root=s3://bucket/runs"]
    assert entrypoint_of(words) == " ".join(words)
    assert shlex.split(entrypoint_of([*words, "a b"]))[-1] == "a b"
