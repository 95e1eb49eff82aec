"""Runs a recipe: python launch/run.py recipe=chinese_llama stage=2"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from orchestrator.compose import compose
print(compose(sys.argv[1:]))
