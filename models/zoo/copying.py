"""Copies of networks of one's own: only the files that their kind needs, whole, and no pickles."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from models import kinds
from models.bundle import MODELS, Base
from models.zoo.inventory import Unreadable, parameters_of

_SINGLE = {"onnx": kinds.ONNX, "ffdnet": kinds.SAFETENSORS}
"""Kinds whose network may be given as one file with this suffix, instead of its folder."""


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of network and where its files are; None for a kind without files."""

    field: str
    kind: str
    path: Path | None

    @classmethod
    def read(cls, field: str, text: str) -> Self:
        """KIND:PATH, or a KIND alone; raises ValueError for an unknown kind or a missing path."""
        kind, colon, path = text.partition(":")
        known = kinds.denoiser_kinds() if field == "denoiser" else kinds.classifier_kinds()
        if kind not in known:
            raise ValueError(
                f"--{field} is {text!r}; it must be KIND:PATH with a kind of {', '.join(known)}"
            )
        if kinds.is_own(kind) and bool(path) == (kind == "none"):
            wanted = "none alone" if kind == "none" else f"{kind}:PATH"
            raise ValueError(f"--{field} is {text!r}; it must be {wanted}")
        place = Path(path).expanduser()  # Shells leave a ~ after a colon.
        if path and not place.exists():
            raise ValueError(f"--{field}: there is no {path}")
        return cls(field, kind, place if colon else None)


def copied(source: Source, files: kinds.Files | None, target: Path) -> Base:
    """The network with its files copied to the folder `target`, each whole.

    `files` are those of the kind; None takes all of the folder. Raises ValueError for a missing
    file, and for one that was cut short or is a pickle.
    """
    if source.path is None:
        return Base(source.kind)
    for name, path in _chosen(source, files).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    _check_whole(source, target)
    return Base.of(source.kind, str(target), ["**/*"])


def _chosen(source: Source, files: kinds.Files | None) -> dict[str, Path]:
    """Files to copy by their names in the network's folder."""
    path = source.path
    assert path is not None  # noqa: S101 - `copied` has returned otherwise
    suffix = _SINGLE.get(source.kind)
    if path.is_file():
        if suffix is None or path.suffix != suffix:
            pickled = " of pickled weights, which are never read" * (path.suffix in kinds.PICKLES)
            wanted = "a folder" if suffix is None else f"a folder or a {suffix} file"
            raise ValueError(
                f"--{source.field}: {path} is a file{pickled}; {source.kind} takes {wanted}"
            )
        found = {f"model{suffix}": path}
        if source.kind == "onnx":
            found["model.json"] = path.with_suffix(".json")
        if missing := next((each for each in found.values() if not each.is_file()), None):
            raise ValueError(f"--{source.field}: {missing} is missing")
        return found
    if files is None:
        return _all_of(source, path)
    chosen: dict[str, Path] = {}
    for pattern in (*files.required, *files.optional):
        matches = [each for each in sorted(path.glob(pattern)) if each.is_file()]
        if not matches and pattern in files.required:
            pickles = sorted(each.name for each in path.rglob("*") if each.suffix in kinds.PICKLES)
            detail = f"; {', '.join(pickles)} is a pickle, which is never read" if pickles else ""
            raise ValueError(
                f"--{source.field}: {path} has no {pattern}, which {source.kind} needs{detail}"
            )
        chosen |= {each.relative_to(path).as_posix(): each for each in matches}
    return {name: each for name, each in chosen.items() if each.suffix not in kinds.PICKLES}


def _all_of(source: Source, path: Path) -> dict[str, Path]:
    found = {each.relative_to(path).as_posix(): each for each in sorted(path.rglob("*"))}
    chosen = {name: each for name, each in found.items() if each.is_file()}
    if pickles := [name for name, each in chosen.items() if each.suffix in kinds.PICKLES]:
        raise ValueError(f"--{source.field}: {path} holds pickled files: {', '.join(pickles)}")
    return chosen


def _check_whole(source: Source, target: Path) -> None:
    """Raises ValueError for a safetensors file that was cut, and for an index's missing shard."""
    for path in sorted(target.rglob(f"*{kinds.SAFETENSORS}")):
        try:
            parameters_of(path)
        except Unreadable as error:
            reason = str(error).replace(f"{target}/", "")
            raise ValueError(f"--{source.field}: {source.path}: {reason}") from error
    for path in sorted(target.rglob("*.index*.json")):
        shards = set(json.loads(path.read_text())["weight_map"].values())
        if missing := sorted(each for each in shards if not (path.parent / each).is_file()):
            raise ValueError(f"--{source.field}: {source.path} has no {', '.join(missing)}")


def parameters(base: Base) -> int:
    """Number of parameters in a network's safetensors files; 0 where it has none."""
    weights = [name for name in base.files if name.endswith(kinds.SAFETENSORS)]
    return sum(sum(parameters_of(MODELS / base.folder / name).values()) for name in weights)
