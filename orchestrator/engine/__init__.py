"""DeepSpeed: a model that trains on several ranks, ZeRO 0 to 3 behind one step."""

from orchestrator.engine.engine import Engine
from orchestrator.engine.peak import peak_flops
from orchestrator.engine.values import EngineSettings, EngineState, StateStream, StepResult, Wishes

__all__ = ["Engine", "EngineSettings", "EngineState", "StateStream", "StepResult", "Wishes", "peak_flops"]
