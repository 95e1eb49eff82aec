"""Ray: where processes run. It schedules and does not remember; what is done lies in the stages' folders."""

import os
from pathlib import Path

# Ray reads these when it is imported and when it starts its own processes, so they are set before any module of this
# package imports it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# A cluster that was started with defaults asks for a token, but a driver that joins it shows its own only in this mode.
if os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").is_file():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
