"""Whether this user is logged in to wandb, seen without importing it."""

import netrc
import os
from pathlib import Path

_HOST = "api.wandb.ai"


def is_logged_in() -> bool:
    """By a key in the environment, or in the file where `wandb login` leaves one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "").partition("://")[2].strip("/") or _HOST
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError, PermissionError):
        return False
