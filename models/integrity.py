"""Integrity of files: where they may lie, their hashes, and copies that are what was hashed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).parent
_CHUNK_BYTES = 2**20


class BundleError(ValueError):
    """A bundle that must not be used; the message names the folder, the file and the reason."""


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(folder: Path, name: str, sha256: str) -> None:
    """Returns where the file is the one stated; raises BundleError as `verified_copies` does."""
    if sha256_of(_path_of(folder, name)) != sha256:
        raise _changed(folder, name)


@contextmanager
def verified_copies(folder: Path, files: Mapping[str, str]) -> Iterator[Path]:
    """A private folder with copies of `files`, a map from names within `folder` to SHA-256 (hex).

    Every byte is hashed as it is copied, so what is loaded from the copies is what was hashed. They
    lie in memory; what maps them keeps them beyond the context. Raises BundleError, by name, for a
    path that leaves the folder, a link, a missing file, and another hash.
    """
    with tempfile.TemporaryDirectory(prefix="vouchsafe-") as private, ExitStack() as descriptors:
        copies = Path(private) / (folder.name or "none")
        copies.mkdir()
        for name, sha256 in files.items():
            descriptor = os.memfd_create(name)
            descriptors.callback(os.close, descriptor)
            if _copied(_path_of(folder, name), descriptor) != sha256:
                raise _changed(folder, name)
            (copies / name).parent.mkdir(parents=True, exist_ok=True)
            (copies / name).symlink_to(f"/proc/self/fd/{descriptor}")
        yield copies


def base_folder(folder: str, models_dir: Path | None) -> Path:
    """Where the folder of a base network lies: relative to this package, or below `models_dir`.

    Raises BundleError, by name, for `..`, a link on the way, and any other place.
    """
    if ".." in PurePosixPath(folder).parts or "\\" in folder:
        raise BundleError(f"the base network's folder {folder!r} holds '..' or a backslash")
    place = PACKAGE / folder
    roots = [PACKAGE] if models_dir is None else [PACKAGE, models_dir.resolve()]
    root = next((root for root in roots if place.is_relative_to(root)), None)
    if root is None:
        allowed = " and ".join(str(root) for root in roots)
        raise BundleError(
            f"the base network's folder {folder!r} lies outside of what may be loaded: {allowed}"
        )
    for part in (place, *place.parents):
        if part == root:
            return place
        if part.is_symlink():
            raise BundleError(f"the base network's folder {folder!r} is reached by a link: {part}")
    return place


def _path_of(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
        raise BundleError(f"{folder}: the path {name!r} leaves the folder")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{folder}: {name!r} is a link")
    if not path.is_file():
        raise BundleError(f"{folder}: {name!r} is missing")
    return path


def _copied(source: Path, descriptor: int) -> str:
    """SHA-256 (hex) of what was written to the descriptor."""
    digest = hashlib.sha256()
    with source.open("rb") as stream, os.fdopen(descriptor, "wb", closefd=False) as copy:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
    return digest.hexdigest()


def _changed(folder: Path, name: str) -> BundleError:
    return BundleError(f"{folder}: {name!r} does not have the hash its manifest states")
