"""What a result was computed with: versions of the libraries, for the record."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "ray",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "bitsandbytes",
)


def versions() -> dict[str, str]:
    """Versions by name of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
