"""Networks fetched from the hub: only the files that are needed, at one commit, all checked."""

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

from models.bundle import SAFETENSORS
from models.files import sha256_of, written_whole
from models.zoo.inventory import Inventory, inspect
from models.zoo.sources import SOURCE, SOURCES, Source

_CACHE = ".cache"
"""Where the hub's client keeps its own notes in a folder, and a fetch its lock and its mark."""
UNFINISHED = "fetch.incomplete"
"""There from the first file that a fetch may change until all are whole."""


class FetchError(RuntimeError):
    """Networks could not be fetched; the message says what to do."""


def fetch(name: str, models_dir: Path, revision: str | None = None) -> Inventory:
    """Fill a folder of SOURCES from its repository, at its own revision unless another is given.

    What is there already and whole stays; what was cut short goes on. Afterwards every file has
    the hub's own hash, and `source.json` tells repository, commit and hashes. Raises FetchError.
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
                told = {"repository": source.repository, "commit": info.sha, "files": hashes}
                partial.write_text(json.dumps(told, indent=2) + "\n")
            (folder / _CACHE / UNFINISHED).unlink()
    except FetchError:
        raise
    except Exception as error:
        raise FetchError(_advice(source, revision, error)) from error
    return inspect(name, models_dir)


def changed_files(folder: Path) -> list[str]:
    """Files of a fetched folder that are not what was fetched; reads every byte of them."""
    told = json.loads((folder / SOURCE).read_text())
    return [
        name
        for name, sha256 in told["files"].items()
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
    """While no other process fetches into the folder; raises FetchError where one does."""
    (folder / _CACHE).mkdir(parents=True, exist_ok=True)
    with (folder / _CACHE / "fetch.lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchError(f"{folder}: another process is fetching into it") from error
        yield


def make_room(folder: Path, files: Sequence[RepoSibling]) -> None:
    """Remove what the hub's client left of downloads that were killed, for it begins them anew.

    Raises FetchError where the files that are not there do not fit on the disk all the same.
    """
    for left in folder.rglob("*.incomplete"):
        if left.name != UNFINISHED:
            left.unlink()
    there = {path for path in folder.rglob("*") if path.is_file()}
    needed = sum(each.size or 0 for each in files if folder / each.rfilename not in there)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{folder}: {needed / 1e9:.1f} GB are to be fetched and {free / 1e9:.1f} GB are free"
        )


def _download(
    repository: str, commit: str, folder: Path, files: Sequence[RepoSibling]
) -> dict[str, str]:
    """SHA-256 (hex) of each file, all of them the hub's; what is not is removed and fetched anew,
    once, for the hub's client believes a file that it has fetched before."""
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
    raise FetchError(f"{repository}: what came is not what the hub lists: {', '.join(wrong)}")


def _is_as(listed: RepoSibling, sha256: str, path: Path) -> bool:
    """Whether a file is the hub's: large ones by SHA-256, small ones as git names them."""
    if listed.lfs is not None:
        return listed.lfs.sha256 == sha256
    content = path.read_bytes()
    named = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return listed.blob_id == named.hexdigest()


def _advice(source: Source, revision: str, error: Exception) -> str:
    page = f"{constants.ENDPOINT}/{source.repository}"
    if isinstance(error, GatedRepoError):
        return (
            f"{source.repository} is behind a licence ({source.licence}). Sign in at {page} and "
            "accept it there, give a token of that account as HF_TOKEN or by `hf auth login`, and "
            "fetch again"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids fetching; unset it, or copy the folder here"
    if isinstance(error, RevisionNotFoundError):
        return f"{source.repository} has no revision {revision!r}; see {page}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{page} is not to be seen with this token, or without one"
    return (
        f"{source.repository} could not be fetched; the same command goes on where it stopped "
        f"({type(error).__name__}: {error})"
    )
