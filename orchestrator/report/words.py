"""Numbers and paths as a person would say them."""

from pathlib import Path


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def size(number_of_bytes: float) -> str:
    """1.5 MB and the like, in powers of 1,000."""
    for unit, bytes_of_unit in (("GB", 1e9), ("MB", 1e6)):
        if number_of_bytes >= bytes_of_unit:
            return f"{number_of_bytes / bytes_of_unit:.1f} {unit}"
    return f"{number_of_bytes / 1e3:.1f} kB"


def shown(path: Path) -> str:
    """A path as a person would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
