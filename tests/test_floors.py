"""The floors of the architecture: imports point down, every vendor has one home, and planning stays light."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "launch": 10,
    **dict.fromkeys(("comparison", "sweep"), 9),
    **dict.fromkeys(
        (
            "pipeline",
            "stage_run",
            "stage_kinds",
            "publishing",
            "assign",
            "status",
            "conversation",
            "evaluation",
            "retrospect",
            "preflight",
        ),
        8,
    ),
    **dict.fromkeys(("cluster", "rayjob"), 7),
    "stages": 6,
    "train": 5,
    **dict.fromkeys(("engine", "checkpoint"), 4),
    **dict.fromkeys(("model", "vocabulary", "data", "tracking", "report"), 3),
    **dict.fromkeys(("compose", "plan", "lease"), 2),
    **dict.fromkeys(("schema", "store", "errors", "contents", "environment", "run_root", "remote"), 1),
}
HOMES = {
    "hydra": ("orchestrator/compose.py", "launch/"),
    "omegaconf": ("orchestrator/compose.py", "launch/"),
    "deepspeed": ("orchestrator/engine/engine.py",),
    "ray": ("orchestrator/cluster/", "orchestrator/data/"),
    "wandb": ("orchestrator/tracking/",),
    "peft": ("orchestrator/model/adapters/",),
    "kubernetes": ("orchestrator/rayjob/",),
    "sentencepiece": ("orchestrator/vocabulary/",),
}
FILES = sorted(path.relative_to(ROOT) for name in ("orchestrator", "launch") for path in (ROOT / name).rglob("*.py"))


def test_every_file_stands_on_a_floor() -> None:
    assert len(FILES) > 70
    assert {unit_of(file) for file in FILES} - FLOORS.keys() == set()


def test_imports_point_down() -> None:
    ours = [(file, name) for file in FILES for name in imports_of(file) if name.startswith("orchestrator.")]
    assert len(ours) > 200
    assert [f"{file} imports {name}" for file, name in ours if not may_import(file, name)] == []


def test_every_vendor_has_one_home() -> None:
    found = [(str(file), name) for file in FILES for name in imports_of(file) if name.partition(".")[0] in HOMES]
    assert {name.partition(".")[0] for _, name in found} >= HOMES.keys()
    strays = [f"{file} imports {name}" for file, name in found if not file.startswith(HOMES[name.partition(".")[0]])]
    assert strays == []


def test_at_most_one_module_of_data_speaks_ray() -> None:
    data = [file for file in FILES if file.is_relative_to("orchestrator/data")]
    assert len(data) > 10
    assert len([file for file in data if any(name.partition(".")[0] == "ray" for name in imports_of(file))]) <= 1


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = """
import sys, orchestrator.compose, orchestrator.plan.plan, orchestrator.plan.inputs, orchestrator.pipeline
print([name for name in ("torch", "ray", "transformers", "deepspeed") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def unit_of(file: Path) -> str:
    """The package, or the file where it lies directly in orchestrator/."""
    is_outermost = file.parts[0] == "launch" or file == Path("orchestrator/__init__.py")
    return "launch" if is_outermost else Path(file.parts[1]).stem


def imports_of(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it: at the top, in a function, or for the type checker alone."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), ".".join(file.parent.parts))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def may_import(file: Path, name: str) -> bool:
    importer, imported = unit_of(file), name.split(".")[1]
    if importer == imported or FLOORS[imported] < FLOORS[importer]:
        return True
    # Files that lie directly in orchestrator/ are one package.
    side_by_side = all((ROOT / "orchestrator" / f"{unit}.py").is_file() for unit in (importer, imported))
    return side_by_side and FLOORS[imported] == FLOORS[importer]
