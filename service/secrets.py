"""The noise secret and the signing key: each made once, in a private file of 32 bytes."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

from models.files import written_once
from service.config import SecretError, variable

logger = logging.getLogger("vouchsafe")

SECRET_BYTES = 32


_MARK = "noise.sha256"

_FOLDERS = {"batches", "tasks", "jobs", "models"}


_NOISE_LOSS = "every image is a new trial"
_SIGNING_LOSS = "certificates are signed by another key"


def load_secret(data_dir: Path, file: Path | None = None) -> bytes:
    """The service's noise secret (32 bytes), made on first use.

    The secret lies in `data_dir`, or in `file` if given. The folder is made with mode 0700 and the
    file with 0600. The file is written atomically: processes that start together agree on the
    first one.

    - Without a `file`, the secret must be a regular file of this user, private to it. An existing
      data directory is closed to other users (`_close_to_others`).
    - With a `file`, the data directory is shared: its owner and mode are the operator's choice. All
      processes that share it need the same secret, and none may lie in it. The file may be a link,
      owned by root or readable by its group, as mounted secrets are.

    Raises SecretError for a file of another length, and for one that others may read.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = data_dir / "noise.secret"
    if file is None:
        _close_to_others(data_dir)
        return _made_secret(own, mounted=False, loss=_NOISE_LOSS)
    return _shared_secret(data_dir, own, file, loss=_NOISE_LOSS)


def load_signing_key(
    data_dir: Path, secret_file: Path | None = None, file: Path | None = None
) -> bytes:
    """The private Ed25519 key (32 bytes, RFC 8032) that signs certificates, made on first use.

    The key lies where `signing_key_file` says. Its file is made and checked as the noise secret's
    is, and so is a data directory that it does not lie in.

    Raises SecretError as `load_secret` does.
    """
    path, own = signing_key_file(data_dir, secret_file, file), data_dir / "signing.key"
    if path == own:
        return _made_secret(own, mounted=file is not None, loss=_SIGNING_LOSS)
    return _shared_secret(data_dir, own, path, loss=_SIGNING_LOSS)


def signing_key_file(data_dir: Path, secret_file: Path | None, file: Path | None) -> Path:
    """The key's file: `file` if given, else beside `secret_file`, or in `data_dir`."""
    return file or (secret_file.parent if secret_file else data_dir) / "signing.key"


def _close_to_others(folder: Path) -> None:
    """Set mode 0700 on a data directory that others may enter.

    Raises SecretError for another user's directory, for one with foreign files, such as /tmp, and
    for a mode that cannot be changed.
    """
    status = folder.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid():
        raise SecretError(
            f"{folder}: belongs to another user (uid {status.st_uid}), who could exchange the "
            f"noise secret in it; name a directory of this user's in {variable('data_dir')}, or, "
            "for one that is shared on purpose, a private file in "
            f"{variable('noise_secret_file')}"
        )
    if not mode & 0o077:
        return
    names = {path.name for path in folder.iterdir()}
    was_used = bool(names & {"noise.secret", _MARK})
    if mode & stat.S_ISVTX or not (was_used or names <= _FOLDERS):
        raise SecretError(
            f"{folder}: others may enter it (mode {mode:04o}), and it is not Vouchsafe's alone; "
            f"name a directory of its own in {variable('data_dir')}"
        )
    try:
        folder.chmod(0o700)
    except OSError as error:
        raise SecretError(
            f"{folder}: others may enter it (mode {mode:04o}), and chmod fails: {error.strerror}"
        ) from error
    logger.warning("%s: was open to other users (mode %04o); its mode is 0700 now", folder, mode)


def _made_secret(path: Path, *, mounted: bool, loss: str) -> bytes:
    """The secret in a file, made where it is missing; `loss` is the effect of a lost one."""
    try:
        if not path.is_symlink() and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            written_once(path, os.urandom(SECRET_BYTES))
    except OSError as error:
        raise SecretError(f"{path}: is missing and cannot be made: {error.strerror}") from error
    return _read_secret(path, mounted=mounted, loss=loss)


def _shared_secret(data_dir: Path, own: Path, file: Path, *, loss: str) -> bytes:
    """The secret in `file`, for a data directory that must hold none as `own`.

    A mark in the directory binds it to its first secret. Raises SecretError for another one.
    """
    if own.is_symlink() or own.exists():
        raise SecretError(
            f"{own}: a secret lies there, readable by all who share the folder; move it to "
            f"{file}, which the settings name"
        )
    path = own.with_suffix(".sha256")
    if not file.exists() and path.exists():
        raise SecretError(
            f"{file}: is missing, and {data_dir} was used with a secret: restore it, or delete "
            f"{path} and accept that {loss}"
        )
    secret = _made_secret(file, mounted=True, loss=loss)
    mark = hashlib.sha256(f"vouchsafe {own.stem}".encode() + secret).hexdigest()
    if not path.exists():
        written_once(path, mark.encode())
    if path.read_text("ascii").strip() != mark:
        raise SecretError(
            f"{file}: is another secret than the one that {data_dir} was used with; restore that "
            f"one, or delete {path} and accept that {loss}"
        )
    return secret


def _read_secret(path: Path, *, mounted: bool, loss: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | (0 if mounted else os.O_NOFOLLOW))
        try:
            status, secret = os.fstat(descriptor), os.read(descriptor, SECRET_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SecretError(f"{path}: cannot be read: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid() and not (mounted and status.st_uid == 0):
        raise SecretError(f"{path}: belongs to another user, who can use the secret")
    if mode & 0o077 and not mounted:
        raise SecretError(f"{path}: others may read it (mode {mode:04o}); run chmod 600 on it")
    if mode & 0o027:
        raise SecretError(
            f"{path}: others may read it, or its group write it (mode {mode:04o}); set 0400, 0440 "
            "or 0600"
        )
    if len(secret) != SECRET_BYTES:
        raise SecretError(
            f"{path}: holds {len(secret)} bytes; a secret has {SECRET_BYTES}; restore it from "
            f"a backup, or delete it and accept that {loss}"
        )
    return secret
