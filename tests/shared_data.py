"""Where the real tokenizers, texts and models lie that tests read and the project does not ship."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ORCHESTRATOR_SHARED_DATA", ROOT.parent / "shared" / "data"))


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips a test, saying what is missing, where the shared data is not there."""
    missing = [name for name in names if not (SHARED / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not found below {SHARED}")
