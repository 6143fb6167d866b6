"""Files written whole or not at all, their hashes, and verified copies of them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

PACKAGE = Path(__file__).parent
_CHUNK_BYTES = 2**20


class BundleError(ValueError):
    """A bundle that must not be used; the message names the folder, the file and the reason."""


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(folder: Path, name: str, sha256: str) -> None:
    """Returns where the file has the stated hash; raises BundleError as `verified_copies` does."""
    if sha256_of(_path_of(folder, name)) != sha256:
        raise _changed(folder, name)


class KnownHashes:
    """SHA-256 (hex) of files, cached in `path` while a file's size and modification time stay."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        if path.exists():
            self._known = json.loads(path.read_text())

    def __call__(self, file: Path) -> str:
        """The hash of a file; a new hash is written to the cache at once."""
        status = file.stat()
        seen = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(str(file))
        if known is None or known[:-1] != seen:
            known = self._known[str(file)] = [*seen, sha256_of(file)]
            with written_whole(self._path) as partial:
                partial.write_text(json.dumps(self._known))
        return str(known[-1])


@contextmanager
def verified_copies(folder: Path, files: Mapping[str, str]) -> Iterator[Path]:
    """A private folder with copies of `files`, a map from names within `folder` to SHA-256 (hex).

    Every byte is hashed as it is copied, so networks are loaded from the bytes that were hashed.
    The copies lie in memory; a memory map of one outlives the context. Raises BundleError with the
    name of a path that leaves the folder, a link, a missing file, or a file with another hash.
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
    """The folder of a base network: relative to this package, or below `models_dir`.

    Raises BundleError with the name of a folder with `..`, a link on the way, or any other place.
    """
    if ".." in PurePosixPath(folder).parts or "\\" in folder:
        raise BundleError(f"the base network's folder {folder!r} holds '..' or a backslash")
    place = PACKAGE / folder
    roots = [PACKAGE] if models_dir is None else [PACKAGE, models_dir.resolve()]
    root = next((root for root in roots if place.is_relative_to(root)), None)
    if root is None:
        allowed = " and ".join(str(root) for root in roots)
        raise BundleError(
            f"the base network's folder {folder!r} lies outside the allowed folders: {allowed}"
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
    """SHA-256 (hex) of the bytes written to the descriptor."""
    digest = hashlib.sha256()
    with source.open("rb") as stream, os.fdopen(descriptor, "wb", closefd=False) as copy:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
    return digest.hexdigest()


def _changed(folder: Path, name: str) -> BundleError:
    return BundleError(f"{folder}: {name!r} does not have the hash its manifest states")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it is renamed to `path` once it is on the disk.

    Where writing fails, the file is removed, because a full disk needs the space. `path` then stays
    as it was.
    """
    descriptor, name = tempfile.mkstemp(prefix=".partial-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def written_once(path: Path, content: bytes) -> None:
    """Create the file with mode 0600 unless it exists; of concurrent callers one succeeds."""
    descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(partial, path)
    except FileExistsError:
        return
    finally:
        os.unlink(partial)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
