"""Nothing here unpickles a file, and no model's own code runs: every place that could is on a list, with its reason.

Ray itself pickles what it carries between the processes of one cluster; that is no part of the scan.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.relative_to(ROOT).as_posix() for name in ("orchestrator", "launch") for path in (ROOT / name).rglob("*.py")
)
PICKLES = (
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "multiprocessing.connection",
)
UNSAFE_CALLS = ("torch.load", "broadcast_object_list", "yaml.load", "yaml.unsafe_load")
BUILT_IN = ("eval", "exec")
UNSAFE_ARGUMENTS = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True, "use_safetensors": False}
ALLOWED = {
    # What a worker and the process that it forked tell each other, over a socket that has no name.
    "multiprocessing.connection": ("orchestrator/cluster/",),
    # An error is copied before it is sent there; no file is read.
    "pickle": ("orchestrator/cluster/rank_process.py",),
    # What rank 0 tells the other ranks of the same stage.
    "broadcast_object_list": ("orchestrator/engine/optimizer_state.py", "orchestrator/stages/resume.py"),
}
AUTO_CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")


def test_nothing_unpickles_but_what_is_listed() -> None:
    assert len(FILES) > 70
    found = [(file, name) for file in FILES for name in unsafe_parts(tree_of(file))]
    assert [(file, name) for file, name in found if not file.startswith(ALLOWED.get(name, ()))] == []
    assert {name for _, name in found} == ALLOWED.keys()


def test_whatever_transformers_loads_brings_no_code() -> None:
    calls = [(file, call) for file in FILES for call in auto_calls(tree_of(file))]
    assert len(calls) >= 5
    assert [f"{file}:{call.lineno}" for file, call in calls if not says(call, "trust_remote_code", False)] == []


def test_whatever_transformers_loads_is_safetensors() -> None:
    calls = [(file, call) for file in FILES for call in auto_calls(tree_of(file))]
    loads = [(file, call) for file, call in calls if ast.unparse(call.func) == "AutoModelForCausalLM.from_pretrained"]
    assert len(loads) >= 1
    assert [f"{file}:{call.lineno}" for file, call in loads if not says(call, "use_safetensors", True)] == []


def test_the_scan_finds_what_it_looks_for() -> None:
    source = """
import pickle
from cloudpickle import loads
from multiprocessing import connection
torch.load(path)
numpy.load(path, allow_pickle=True)
eval(text)
model.eval()
AutoConfig.from_pretrained(folder, trust_remote_code=True)
AutoTokenizer.from_pretrained(folder)
"""
    tree = ast.parse(source)
    imported = {"pickle", "cloudpickle", "multiprocessing.connection"}
    assert set(unsafe_parts(tree)) == imported | {"torch.load", "allow_pickle=True", "eval", "trust_remote_code=True"}
    assert [says(call, "trust_remote_code", False) for call in auto_calls(tree)] == [False, False]


def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def unsafe_parts(tree: ast.Module) -> Iterator[str]:
    """Modules, calls and arguments through which bytes or files become objects of any kind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for name in PICKLES if any(f"{module}.".startswith(f"{name}.") for module in modules_of(node)))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            yield from (name for name in UNSAFE_CALLS if f".{called}".endswith(f".{name}"))
            yield from (name for name in BUILT_IN if called == name)
            yield from (f"{name}={value}" for name, value in UNSAFE_ARGUMENTS.items() if says(node, name, value))


def modules_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    return [f"{prefix}{alias.name}" for alias in node.names]


def auto_calls(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) in AUTO_CLASSES
        ):
            yield node


def says(call: ast.Call, name: str, value: bool) -> bool:
    return any(
        word.arg == name and isinstance(word.value, ast.Constant) and word.value.value is value for word in call.keywords
    )
