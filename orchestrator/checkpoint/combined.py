"""One adapter from several of the same base."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file

from orchestrator.checkpoint.inventory import Described, verify
from orchestrator.checkpoint.manifest import Origin, check_belongs, shapes_of, write_manifest
from orchestrator.contents import copy_tokenizer
from orchestrator.errors import ModelError
from orchestrator.model.adapters import weights_of
from orchestrator.model.adapters.several import How, SeveralAdapters
from orchestrator.model.loading import load_model
from orchestrator.store import sha256_value


def combine(weights: Mapping[Path, float], how: How, density: float | None, out: Path, base: Path | None = None) -> None:
    """Writes an adapter folder; the base is where the adapters were trained, or at `base`.

    ModelError where there are not several, they are of different bases or tokenizers, PEFT cannot combine them, or `out` is
    there already.
    """
    if len(weights) < 2:
        raise ModelError("give two adapters or more, each with a weight")
    if out.exists():
        raise ModelError(f"{out} is there already; give another --out")
    found = [verify(folder) for folder in weights]
    _check_alike(found)
    if others := [each for each in found if not each.is_peft]:
        raise ModelError(f"{others[0].folder}: {others[0].method} is not linear, and its weights cannot be added up")
    origin = found[0].manifest.origin
    place = base or Path(origin.base_name)
    if not place.is_dir():
        raise ModelError(f"the base {place} is not there; say where it lies with --base")
    check_belongs(found[0].folder, found[0].manifest, place, found[0].folder)
    several = SeveralAdapters(load_model(place, "fp32"))
    names = {f"adapter_{number}": each for number, each in enumerate(found)}
    for name, each in names.items():
        several.load(name, each.folder)
    several.combine("combined", dict(zip(names, weights.values(), strict=True)), how, density)
    out.parent.mkdir(parents=True, exist_ok=True)
    several.save("combined", out)
    copy_tokenizer(found[0].folder, out)
    (out / "README.md").unlink(missing_ok=True)
    _write_manifest(out, found, weights, how, density)


def _check_alike(found: list[Described]) -> None:
    first = found[0]
    for other in found[1:]:
        for what in ("base_hash", "tokenizer_hash"):
            if getattr(other.manifest.origin, what) != getattr(first.manifest.origin, what):
                raise ModelError(
                    f"{first.folder} and {other.folder} were trained on different {what.removesuffix('_hash')}s: "
                    f"{getattr(first.manifest.origin, what)[:12]} and {getattr(other.manifest.origin, what)[:12]}"
                )


def _write_manifest(
    out: Path, found: list[Described], weights: Mapping[Path, float], how: How, density: float | None
) -> None:
    parents = {
        f"{each.manifest.origin.stage}_{number}": each.manifest.origin.fingerprint for number, each in enumerate(found)
    }
    origin = found[0].manifest.origin
    own = sha256_value({"parents": parents, "weights": list(weights.values()), "how": how, "density": density})
    shapes = shapes_of(load_file(weights_of(out)))
    write_manifest(
        out, Origin("combined", own, parents, origin.base_name, origin.base_hash, origin.tokenizer_hash, 0), shapes
    )
