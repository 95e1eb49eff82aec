"""Adapters of several tasks on one loaded base: switched without a reload, and combined into new ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from torch import nn

from orchestrator.errors import ModelError

How = Literal["linear", "svd", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune"]


class SeveralAdapters:
    """A base model with adapters by name; one of them, or none, is in use."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._model: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._model.peft_config) if self._model else ()

    def load(self, name: str, folder: Path) -> None:
        """Adds an adapter; it is for the caller to see that it belongs to this base."""
        if self._model is None:
            self._model = PeftModel.from_pretrained(self._base, str(folder), adapter_name=name)
        else:
            self._model.load_adapter(str(folder), adapter_name=name)

    def using(self, name: str) -> nn.Module:
        """The model as the adapter of that name makes it."""
        if name not in self.names:
            raise ModelError(f"no adapter is called {name}; there are {', '.join(self.names) or 'none'}")
        self._model.set_adapter(name)
        return self._model.eval()

    def combine(self, name: str, weights: Mapping[str, float], how: How, density: float | None = None) -> None:
        """A new adapter from others by weight. `density` is the share of the values that ties and dare keep.

        ModelError where PEFT cannot combine them: other methods than LoRA, other ranks (but for svd and cat), embeddings or
        heads that were trained as a whole.
        """
        try:
            self._model.add_weighted_adapter(
                list(weights), list(weights.values()), name, combination_type=how, density=density
            )
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise ModelError(f"{', '.join(weights)} cannot be combined by {how}: {error}") from error

    def save(self, name: str, folder: Path) -> None:
        """As PEFT writes it: `folder` holds the adapter itself."""
        self._model.save_pretrained(str(folder.parent), selected_adapters=[name])
        (folder.parent / name).rename(folder)
