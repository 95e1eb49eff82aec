"""Runs a recipe: python launch/run.py recipe=chinese_llama stage=2"""

import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

# The project also runs from a checkout that was never installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.supervise import MAY_PASS, OUR_MISTAKE, supervise
from orchestrator.comparison import run_comparison
from orchestrator.compose import CONFIG_NAME, RECIPES_FOLDER, compose, sweep
from orchestrator.errors import ClusterError, Interrupted, OrchestratorError, RecipeError
from orchestrator.pipeline import run_pipeline
from orchestrator.report.console import Console
from orchestrator.sweep import run_sweep, swept_recipes


def run(words: Sequence[str]) -> None:
    """Runs the recipe that the words describe; a user's mistake ends with its message and no traceback."""
    with _explained():
        recipe = compose(words)
        console = Console(is_plain=recipe.ui == "plain")
        if recipe.supervise:
            command = [sys.executable, __file__, *words, "supervise=false"]
            sys.exit(supervise(command, recipe.recovery.max_failures))
        command = shlex.join(["python", "launch/run.py", *words])
        if recipe.compare:
            run_comparison(recipe, console, command)
        else:
            run_pipeline(recipe, console, command)


def run_all(words: Sequence[str]) -> None:
    """The same for every combination of words that have several values."""
    with _explained():
        asked = sweep(words)
        recipes = swept_recipes(asked.combinations)
        command = shlex.join(["python", "launch/run.py", "-m", *words])
        run_sweep(recipes, asked.names, Console(is_plain=recipes[0].ui == "plain"), command)


@contextmanager
def _explained() -> Iterator[None]:
    console = Console()
    try:
        yield
    except Interrupted as error:
        console.fail(str(error))
        sys.exit(128 + error.signal_number)
    except ClusterError as error:
        console.fail(str(error))
        sys.exit(MAY_PASS)
    except OrchestratorError as error:
        console.fail(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        console.fail("interrupted; the same command goes on with what is not done")
        sys.exit(130)
    # Anything else is our mistake. Python would exit with 1, as Ray does when it ends a process that has lost its head.
    except Exception:  # noqa: BLE001
        console.fail(traceback.format_exc())
        sys.exit(OUR_MISTAKE)


@hydra.main(version_base="1.3", config_path=str(RECIPES_FOLDER), config_name=CONFIG_NAME)
def through_hydra(config: DictConfig) -> None:
    """Reached by Hydra's own flags; --help, --cfg and --info end before."""
    run(list(HydraConfig.get().overrides.task))


def main(arguments: Sequence[str]) -> None:
    """Plain words go straight to `run`, whose errors say more than Hydra's; all flags but --multirun are Hydra's own."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    if not any(argument.startswith("-") for argument in arguments):
        run(arguments)
        return
    if swept := [
        argument for argument in arguments if argument.startswith("stage=") and "," in argument and "[" not in argument
    ]:
        # Hydra would run the stages as two pipelines side by side, neither waiting for the other.
        error = RecipeError(
            f"{swept[0]}: stages of one pipeline are a list, stage=[{swept[0].removeprefix('stage=')}], without --multirun"
        )
        Console().fail(str(error))
        sys.exit(2)
    if flags and set(flags) <= {"-m", "--multirun"}:
        run_all([argument for argument in arguments if argument not in flags])
        return
    through_hydra()


if __name__ == "__main__":
    main(sys.argv[1:])
