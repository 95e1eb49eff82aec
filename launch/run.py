"""Runs a recipe: python launch/run.py recipe=chinese_llama stage=2"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.compose import RECIPES_FOLDER, compose
from orchestrator.errors import OrchestratorError
from orchestrator.pipeline import run_pipeline
from orchestrator.report.console import Console

_HYDRA_FLAGS = ("-", "hydra.", "hydra/")


@hydra.main(version_base="1.3", config_path=str(RECIPES_FOLDER), config_name="config")
def main(config: DictConfig) -> None:
    """Only reached through Hydra's own flags (--help, --cfg job, --multirun); plain words go straight to `run`."""
    run(list(hydra.core.hydra_config.HydraConfig.get().overrides.task))


def run(words: list[str]) -> None:
    """Runs the recipe that the words describe; a user's mistake ends with its message and no traceback."""
    console = Console()
    try:
        run_pipeline(compose(words), console)
    except OrchestratorError as error:
        console.fail(str(error))
        sys.exit(2)


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        main()
    else:
        run(sys.argv[1:])
