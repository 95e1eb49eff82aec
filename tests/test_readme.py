"""The README is true: its map is the tree, its words are the recipe's, and its example recipe composes."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from orchestrator.compose import RECIPES_FOLDER, compose
from tests.bench.scaling import table
from tests.shared_data import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def mapped_paths() -> set[str]:
    """Every path in the map; indentation says which folder a name lies in."""
    block = README.split("## Map", 1)[1].split("\n\n", 1)[1].split("\n\n", 1)[0]
    folders: list[str] = []
    found: set[str] = set()
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        names = re.match(r"\s*((?:[\w./]+ )*[\w./]+)(?:\s{2,}|$)", line)
        assert names, line
        for name in names[1].split():
            if not re.search(r"[./]", name):
                continue
            path = "/".join([*folders[:depth], name.rstrip("/")])
            found.add(path)
            if name.endswith("/") and len(names[1].split()) == 1:
                folders[depth:] = [path.rsplit("/", 1)[-1] if depth else name.rstrip("/")]
    return found


def test_every_path_on_the_map_exists() -> None:
    paths = mapped_paths()
    assert len(paths) > 60
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_source_file_is_on_the_map() -> None:
    listing = ["git", "ls-files", "orchestrator", "launch"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    sources = {path for path in tracked.stdout.split() if path.endswith(".py") and not path.endswith("__init__.py")}
    assert len(sources) > 50
    assert sorted(sources - mapped_paths()) == []


def test_every_command_of_the_readme_composes() -> None:
    text = README.replace("\\\n", " ")
    commands = re.findall(r"^ +python launch/run\.py (.+)$", text, flags=re.MULTILINE)
    commands += re.findall(r'make run ARGS="([^"]+)"', text)
    assert len(commands) >= 3
    for command in commands:
        compose(shlex.split(command))


def test_the_example_recipe_composes(tmp_path: Path) -> None:
    example = README.split("```yaml\n", 1)[1].split("```", 1)[0]
    folder = tmp_path / "recipes"
    shutil.copytree(RECIPES_FOLDER, folder)
    (folder / "recipe" / "my_language.yaml").write_text(example, encoding="utf-8")
    recipe = compose(["recipe=my_language"], folder)
    assert list(recipe.stages) == ["vocabulary", "attention", "export"]
    assert recipe.stages["attention"].model_dump()["steps"] == 2000


def test_the_words_of_the_table_are_the_words_of_the_config() -> None:
    table = README.split("| word | meaning |", 1)[1].split("\n\n", 1)[0]
    words = set(re.findall(r"`(\w+)=`", table))
    config = (RECIPES_FOLDER / "config.yaml").read_text(encoding="utf-8")
    declared = set(re.findall(r"^(?:  - )?(\w+):", config, flags=re.MULTILINE)) - {"defaults", "retention", "hydra"}
    assert words == declared


def test_the_table_of_scaling_is_the_one_that_is_printed() -> None:
    assert table() in README
