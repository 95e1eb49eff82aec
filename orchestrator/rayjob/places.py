"""Where pods see files: what a recipe names must be there, since this machine's disk is not."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from orchestrator.errors import RecipeError
from orchestrator.schema import HeldOutShare, KubernetesCluster, RandomBase, Recipe, WeightedSource, WeightedSources


def check_places(recipe: Recipe, cluster: KubernetesCluster) -> None:
    """RecipeError lists every path that pods would not see, or would lose with themselves."""
    problems = []
    if not _is_kept(recipe.run_root, cluster, to_write=True):
        problems.append(
            f"run_root: {recipe.run_root} lies in no volume of the pods ({_shown(cluster)}), and would be lost with them; "
            "give cluster.volumes one that holds it, or an object store such as s3://bucket/runs"
        )
    problems += [
        f"{field}: {source} is a path of this machine; pods see sample:NAME, URLs, hub ids, and what lies in a volume "
        f"({_shown(cluster)})"
        for field, source in _sources(recipe)
        if _is_local(source) and not _is_kept(source, cluster)
    ]
    if _is_from_hub(recipe.base_model) and "://" in recipe.run_root and not _is_kept(_hub_folder(cluster), cluster, True):
        problems.append(
            f"base_model: {recipe.base_model} comes from the hub to one pod, and with a run root in an object store "
            "the others do not see it; give cluster.volumes one for it, and cluster.environment.HF_HOME a folder in there"
        )
    if problems:
        raise RecipeError(problems)


def with_hub_folder(recipe: Recipe, cluster: KubernetesCluster) -> KubernetesCluster:
    """What comes from the hub goes beside the results, where all pods see it, unless HF_HOME says otherwise."""
    root = PurePosixPath(mount_path(cluster, recipe.run_root))
    if "://" in recipe.run_root or "HF_HOME" in {*cluster.environment, *cluster.secrets}:
        return cluster
    return cluster.model_copy(update={"environment": {"HF_HOME": str(root / ".hub"), **cluster.environment}})


def mount_path(cluster: KubernetesCluster, path: str) -> str:
    """Absolute in the pods, where relative paths begin in the project's folder."""
    return str(PurePosixPath(cluster.project_folder, path))


def _is_kept(path: str, cluster: KubernetesCluster, to_write: bool = False) -> bool:
    if "://" in path:
        return not path.startswith("file:")
    volumes = [volume for volume in cluster.volumes.values() if not (to_write and volume.read_only)]
    places = [PurePosixPath(mount_path(cluster, volume.path)) for volume in volumes]
    inside = PurePosixPath(mount_path(cluster, path))
    return ".." not in inside.parts and any(inside.is_relative_to(place) for place in places)


def _is_local(source: str) -> bool:
    """Plainly a path, or one that is there: a hub id looks like a relative path."""
    if source.startswith("sample:") or ("://" in source and not source.startswith("file:")):
        return False
    return source.startswith(("/", ".", "~", "file:")) or Path(source).exists()


def _is_from_hub(base_model: str | RandomBase) -> bool:
    return isinstance(base_model, str) and "://" not in base_model and not _is_local(base_model)


def _hub_folder(cluster: KubernetesCluster) -> str:
    """Where the pods keep what they fetch; in their own home, unless they are told."""
    return cluster.environment.get("HF_HOME", "/nowhere")


def _sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every file that the recipe names, with its field."""
    if not isinstance(recipe.base_model, RandomBase):
        yield "base_model", recipe.base_model
    for field in ("text", "instructions", "validation", "validation_instructions"):
        yield from ((field, path) for path in _paths(getattr(recipe, field)))
    if recipe.retention:
        yield from (("retention.text", source) for source in recipe.retention.text)
    for name, stage in recipe.stages.items():
        yield from ((f"stages.{name}.data", path) for path in _paths(getattr(stage, "data", None) or ()))
        for field in ("sentencepiece_model", "prompts", "task_folder"):
            if path := getattr(stage, field, None):
                yield f"stages.{name}.{field}", path


def _paths(sources: WeightedSources | HeldOutShare) -> list[str]:
    """A share of the text names no file of its own."""
    if isinstance(sources, HeldOutShare):
        return []
    return [source.path if isinstance(source, WeightedSource) else source for source in sources]


def _shown(cluster: KubernetesCluster) -> str:
    return ", ".join(mount_path(cluster, volume.path) for volume in cluster.volumes.values()) or "there is none"
