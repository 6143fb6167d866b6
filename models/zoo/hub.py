"""Fetches networks from the hub: only the files needed, at one commit, all verified."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from models.files import sha256_of, written_whole
from models.kinds import SAFETENSORS
from models.zoo.inventory import Inventory, inspect
from models.zoo.sources import SOURCE, SOURCES, Source

_CACHE = ".cache"
"""The folder of the hub client's cache, and of a fetch's lock and marker file."""
UNFINISHED = "fetch.incomplete"
"""The marker of an unfinished fetch: it exists until all files are complete."""


class FetchError(RuntimeError):
    """Networks could not be fetched; the message has the remedy."""


def fetch(name: str, models_dir: Path, revision: str | None = None) -> Inventory:
    """The inventory of a folder of SOURCES, filled from its repository.

    `revision` defaults to the source's own. Complete files stay, and interrupted downloads resume.
    Afterwards every file has the hub's hash, and `source.json` holds repository, commit and hashes.
    Raises FetchError.
    """
    source, folder = SOURCES[name], models_dir / name
    revision = revision or source.revision
    try:
        info = HfApi().model_info(source.repository, revision=revision, files_metadata=True)
        listed = {each.rfilename: each for each in info.siblings or ()}
        wanted = _wanted(source, listed, str(info.sha))
        with _alone(folder):
            make_room(folder, [listed[each] for each in wanted])
            (folder / SOURCE).unlink(missing_ok=True)
            (folder / _CACHE / UNFINISHED).touch()
            files = [listed[each] for each in wanted]
            hashes = _download(source.repository, str(info.sha), folder, files)
            with written_whole(folder / SOURCE) as partial:
                origin = {"repository": source.repository, "commit": info.sha, "files": hashes}
                partial.write_text(json.dumps(origin, indent=2) + "\n")
            (folder / _CACHE / UNFINISHED).unlink()
    except FetchError:
        raise
    except Exception as error:
        raise FetchError(_advice(source, revision, error)) from error
    return inspect(name, models_dir)


def changed_files(folder: Path) -> list[str]:
    """Files of a fetched folder that have changed since; reads every byte of them."""
    fetched = json.loads((folder / SOURCE).read_text())
    return [
        name
        for name, sha256 in fetched["files"].items()
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256
    ]


def _wanted(source: Source, listed: Mapping[str, RepoSibling], commit: str) -> list[str]:
    wanted = source.wanted(listed)
    for network in source.networks:
        inside = f"{network.folder}/" if network.folder else ""
        names = [each.removeprefix(inside) for each in wanted if each.startswith(inside)]
        if not any(each.endswith(SAFETENSORS) for each in network.chosen(names)[1]):
            raise FetchError(
                f"{source.repository} at {commit} has no {inside}{network.weights}{SAFETENSORS}; "
                "pickled weights are never fetched"
            )
    return wanted


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; raises FetchError where another process fetches into the folder."""
    (folder / _CACHE).mkdir(parents=True, exist_ok=True)
    with (folder / _CACHE / "fetch.lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchError(f"{folder}: another process is fetching into it") from error
        yield


def make_room(folder: Path, files: Sequence[RepoSibling]) -> None:
    """Remove the partial downloads of killed processes, which the hub's client never resumes.

    Raises FetchError where the missing files do not fit on the disk all the same.
    """
    for left in folder.rglob("*.incomplete"):
        if left.name != UNFINISHED:
            left.unlink()
    there = {path for path in folder.rglob("*") if path.is_file()}
    needed = sum(each.size or 0 for each in files if folder / each.rfilename not in there)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{folder}: {needed / 1e9:.1f} GB are to be fetched, {free / 1e9:.1f} GB are free"
        )


def _download(
    repository: str, commit: str, folder: Path, files: Sequence[RepoSibling]
) -> dict[str, str]:
    """SHA-256 (hex) of each file, all equal to the hub's.

    A file that differs is removed and fetched once more, because the hub's client trusts files that
    it fetched before.
    """
    names = [each.rfilename for each in files]
    wrong: list[str] = []
    for _ in range(2):
        snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=names)
        hashes = {name: sha256_of(folder / name) for name in names}
        wrong = [
            each.rfilename
            for each in files
            if not _is_as(each, hashes[each.rfilename], folder / each.rfilename)
        ]
        if not wrong:
            return hashes
        for name in wrong:
            (folder / name).unlink()
    raise FetchError(f"{repository}: fetched files differ from the hub's list: {', '.join(wrong)}")


def _is_as(listed: RepoSibling, sha256: str, path: Path) -> bool:
    """Whether a file is the hub's: large ones are compared by SHA-256, small ones by git's hash."""
    if listed.lfs is not None:
        return listed.lfs.sha256 == sha256
    content = path.read_bytes()
    named = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return listed.blob_id == named.hexdigest()


def _advice(source: Source, revision: str, error: Exception) -> str:
    page = f"{constants.ENDPOINT}/{source.repository}"
    if isinstance(error, GatedRepoError):
        return (
            f"{source.repository} requires a license ({source.licence}). Sign in at {page} and "
            "accept it there, give a token of that account as HF_TOKEN or by `hf auth login`, and "
            "fetch again"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids fetching; unset it, or copy the folder here"
    if isinstance(error, RevisionNotFoundError):
        return f"{source.repository} has no revision {revision!r}; see {page}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{page} does not exist, or cannot be read with this token or without one"
    return (
        f"{source.repository} could not be fetched; the same command goes on where it stopped "
        f"({type(error).__name__}: {error})"
    )
