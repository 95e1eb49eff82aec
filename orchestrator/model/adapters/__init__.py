"""What differs from the base, as PEFT makes, calls and writes it. PEFT is spoken in this folder only.

Bottlenecks, which PEFT has not, are AdapterHub's.
"""

from orchestrator.model.adapters.attaching import (
    adapter_parameters,
    attach,
    count_by_kind,
    count_parameters,
    load_adapter,
    second_factors,
    trained_parameters,
)
from orchestrator.model.adapters.config import peft_config, weights_name, weights_of, write_config
from orchestrator.model.adapters.merging import MergeRule, merge_rule, read_merge_rule
from orchestrator.model.adapters.names import KEY_PREFIX, ROWS_NAME
from orchestrator.model.adapters.ranks import LayerRank, layer_ranks
from orchestrator.model.adapters.singular import beginnings
from orchestrator.model.adapters.tensors import adapter_tensors, load_tensors, written_tensors

__all__ = [
    "KEY_PREFIX",
    "ROWS_NAME",
    "LayerRank",
    "MergeRule",
    "adapter_parameters",
    "adapter_tensors",
    "attach",
    "beginnings",
    "count_by_kind",
    "count_parameters",
    "layer_ranks",
    "load_adapter",
    "load_tensors",
    "merge_rule",
    "peft_config",
    "read_merge_rule",
    "second_factors",
    "trained_parameters",
    "weights_name",
    "weights_of",
    "write_config",
    "written_tensors",
]
