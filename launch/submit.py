"""Hands a recipe to Kubernetes: python launch/submit.py recipe=chinese_llama stage=2 cluster=kubernetes

The words are those of run.py. Three more say what to do: action=submit (hand it in and follow it), render, status, logs,
stop or list; output=FILE takes what is rendered; follow=false hands it in and leaves.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# The project also runs from a checkout that was never installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.supervise import MAY_PASS
from orchestrator.cluster.capacity import declared_capacity
from orchestrator.cluster.sizing import check_precision, workers_for
from orchestrator.compose import compose
from orchestrator.errors import ClusterError, OrchestratorError, RecipeError
from orchestrator.plan.inputs import check_credentials
from orchestrator.rayjob.build import as_yaml, build_rayjob
from orchestrator.rayjob.check import crd_at_hand, manifest_problems
from orchestrator.rayjob.job import RayJob
from orchestrator.rayjob.names import pipeline_fingerprint
from orchestrator.rayjob.state import JobState, state_of
from orchestrator.report.console import Console
from orchestrator.schema import KubernetesCluster, Recipe, TrainStage

if TYPE_CHECKING:
    from orchestrator.rayjob.api import RayJobs

ACTIONS = ("submit", "render", "status", "logs", "stop", "list")
_OWN_WORDS = ("action", "output", "follow")


@dataclass(frozen=True)
class Request:
    """What is to be done with the RayJob of a recipe."""

    action: str
    output: Path | None
    follow: bool
    words: tuple[str, ...]
    """For run.py."""


def main(arguments: Sequence[str]) -> int:
    """The exit code: of the command, where it was followed to its end."""
    console = Console()
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        return _act(read_request(arguments), console)
    except ClusterError as error:
        console.fail(str(error))
        return MAY_PASS
    except OrchestratorError as error:
        console.fail(str(error))
        return 2
    except KeyboardInterrupt:
        console.fail("no longer followed; the job goes on. action=logs follows it again, action=stop ends it")
        return 130


def read_request(arguments: Sequence[str]) -> Request:
    """Parts the words that are for this command from those for run.py; RecipeError for a value that it does not know."""
    own = {key: value for key, _, value in (word.partition("=") for word in arguments) if key in _OWN_WORDS}
    words = tuple(word for word in arguments if word.partition("=")[0] not in _OWN_WORDS)
    action, follow = own.get("action", "submit"), own.get("follow", "true")
    problems = []
    if action not in ACTIONS:
        problems.append(f"action: {action!r} is none of {', '.join(ACTIONS)}")
    if follow not in ("true", "false"):
        problems.append(f"follow: {follow!r} is neither true nor false")
    if "output" in own and action != "render":
        problems.append(f"output: is for action=render, not for action={action}")
    if problems:
        raise RecipeError(problems)
    return Request(action, Path(own["output"]) if "output" in own else None, follow == "true", words)


def checked_job(recipe: Recipe, cluster: KubernetesCluster, words: Sequence[str]) -> RayJob:
    """The job that runs these words; RecipeError lists everything that is wrong with it."""
    check_credentials(recipe)
    # What the command would find out in its pod, minutes later.
    trained = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, TrainStage)}
    check_precision(recipe.precision, workers_for(recipe.workers, declared_capacity(cluster), cluster, trained))
    job = build_rayjob(recipe, cluster, words)
    if problems := manifest_problems(job.as_manifest(), crd_at_hand()):
        raise RecipeError(problems)
    return job


def _act(request: Request, console: Console) -> int:
    recipe = compose(request.words)
    cluster = recipe.cluster
    if not isinstance(cluster, KubernetesCluster):
        raise RecipeError(f"cluster: {cluster.kind} is not Kubernetes; say cluster=kubernetes, or take launch/run.py")
    if request.action == "render":
        return _render(checked_job(recipe, cluster, request.words), request.output, console)
    # Its client takes a moment to import.
    from orchestrator.rayjob.api import RayJobs  # noqa: PLC0415

    jobs = RayJobs(cluster)
    if request.action == "list":
        return _list(jobs.ours(), console)
    if request.action == "submit":
        from orchestrator.rayjob.submission import submit  # noqa: PLC0415

        name = submit(jobs, checked_job(recipe, cluster, request.words), console.note)
        return _follow(jobs, name, console) if request.follow else 0
    return _about(request.action, jobs, _newest(jobs, recipe), request.follow, console)


def _about(action: str, jobs: "RayJobs", state: JobState, follow: bool, console: Console) -> int:
    """Status, logs or stop of the job that there is."""
    match action:
        case "status":
            console.say(f"{state.name}: {state}")
            if state.message:
                console.say(state.message)
            return state.exit_code if state.has_ended else 0
        case "logs" if follow and not state.has_ended:
            return _follow(jobs, state.name, console)
        case "logs":
            for pod in jobs.submitters(state.name):
                for line in jobs.log(pod, follow=False):
                    print(line)
            return 0
        case _:
            jobs.delete(state.name)
            console.say(f"{state.name} is being stopped: it saves, and the same command goes on from there")
            return 0


def _follow(jobs: "RayJobs", name: str, console: Console) -> int:
    from orchestrator.rayjob.submission import follow  # noqa: PLC0415

    state = follow(jobs, name, console.note, lambda line: print(line, flush=True))
    if state.exit_code:
        console.fail(f"{name} failed: {state.message or state.reason or state}")
    return state.exit_code


def _newest(jobs: "RayJobs", recipe: Recipe) -> JobState:
    found = [state_of(job) for job in jobs.ours(pipeline_fingerprint(recipe))]
    if not found:
        raise RecipeError("this pipeline was not handed in there; action=list shows what was")
    return found[-1]


def _render(job: RayJob, output: Path | None, console: Console) -> int:
    text = as_yaml(job)
    if output is None:
        print(text, end="")
        return 0
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RecipeError(f"output: {output} is there already; name another, or remove it") from error
    except OSError as error:
        raise RecipeError(f"output: {output} cannot be written ({error.strerror})") from error
    console.note(f"{job.metadata.name} written to {output}; kubectl create -f {output} hands it in")
    return 0


def _list(found: Sequence[dict], console: Console) -> int:
    if not found:
        console.say("nothing was handed in there")
        return 0
    states = [state_of(job) for job in found]
    rows = [
        (state.name, state.pipeline, state.stage, f"{state.created:%Y-%m-%d %H:%M}" if state.created else "", str(state))
        for state in states
    ]
    console.show_table(("name", "pipeline", "stage", "since (UTC)", "state"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
