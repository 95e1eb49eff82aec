"""What AdapterHub's library (adapters 1.3) says of bottleneck adapters, which PEFT has not."""

import math
from pathlib import Path
from typing import Any

from orchestrator.errors import ModelError
from orchestrator.model.bottlenecks import NAME
from orchestrator.model.loading import load_config
from orchestrator.schema import Bottleneck
from orchestrator.store import read_json, write_json

WEIGHTS_NAME = "adapter.safetensors"
_CONFIG_NAME = "adapter_config.json"
_FORMAT = "adapters.1.3.0"


def write_bottleneck_config(method: Bottleneck, folder: Path, base: Path) -> None:
    """Description of the networks of `method` on the model in the folder `base`, as that library reads it."""
    model = load_config(base)
    hidden: int = model.hidden_size
    config = {
        "architecture": None,
        "mh_adapter": method.placement == "houlsby",
        "output_adapter": True,
        "reduction_factor": _factor(hidden, method.size),
        "non_linearity": "relu",
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "ln_before": False,
        "ln_after": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "init_weights": "bert",
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "is_parallel": False,
        "leave_out": [],
        "phm_layer": False,
        "scaling": 1.0,
        "use_gating": False,
    }
    about = {
        "model_type": model.model_type,
        "hidden_size": hidden,
        "model_name": str(base),
        "name": NAME,
        "model_class": (model.architectures or ["LlamaForCausalLM"])[0],
        "version": _FORMAT,
    }
    write_json(folder / _CONFIG_NAME, about | {"config": config})


def read_bottleneck(folder: Path) -> Bottleneck | None:
    """The method of an adapter folder; None where it holds another."""
    config: dict[str, Any] = read_json(folder / _CONFIG_NAME)
    if "peft_type" in config:
        return None
    networks = config.get("config", {})
    if config.get("name") != NAME or "reduction_factor" not in networks:
        raise ModelError(f"{folder / _CONFIG_NAME} describes neither PEFT's adapters nor a bottleneck of this project")
    return Bottleneck(
        kind="bottleneck",
        placement="houlsby" if networks["mh_adapter"] else "pfeiffer",
        size=int(config["hidden_size"] // networks["reduction_factor"]),
    )


def _factor(hidden: int, size: int) -> float:
    """By which that library divides, with floor, to find the size again."""
    factor = hidden / size
    while int(hidden // factor) < size:
        factor = math.nextafter(factor, 0)
    return factor
