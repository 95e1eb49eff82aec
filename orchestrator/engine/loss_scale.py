"""DeepSpeed's dynamic loss scale in fp16, which it keeps under other names without ZeRO than with it."""

from typing import Any

from orchestrator.engine.values import EngineSettings

_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What the scale depends on; without ZeRO there is no hysteresis."""


class LossScale:
    """1 and nothing to keep in other precisions."""

    def __init__(self, optimizer: Any, settings: EngineSettings) -> None:
        """`optimizer` is DeepSpeed's."""
        self._scaler: Any = None
        self._has_zero = settings.zero > 0
        if settings.precision == "fp16":
            self._scaler = optimizer.loss_scaler if self._has_zero else optimizer.loss_scale_config
            if self._has_zero:
                # At the minimum DeepSpeed would raise a bare Exception instead of skipping the step.
                self._scaler.raise_error_at_min_scale = False

    @property
    def now(self) -> float:
        return self._scaler.cur_scale if self._scaler is not None else 1.0

    @property
    def forgotten(self) -> float:
        """Without ZeRO, DeepSpeed takes the scale out of gradients into which it never put it; 1 otherwise."""
        return 1.0 if self._has_zero else self.now

    @property
    def is_least(self) -> bool:
        if self._scaler is None:
            return False
        return self.now <= (self._scaler.min_scale if self._has_zero else self._scaler.min_loss_scale)

    def numbers(self) -> dict[str, int | float]:
        return {name: getattr(self._scaler, name) for name in _NUMBERS if hasattr(self._scaler, name)}

    def load(self, numbers: dict[str, int | float]) -> None:
        for name in self.numbers().keys() & numbers.keys():
            setattr(self._scaler, name, numbers[name])
