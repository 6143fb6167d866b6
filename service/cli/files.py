"""Files that commands name: images to classify, and the certificates of these."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from service.predictions.document import SignedCertificate

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
"""Suffixes of the pictures in a folder."""
_NAMED_SUFFIXES = ", ".join(SUFFIXES)


def pictures(arguments: Sequence[str]) -> list[Path]:
    """The files that the arguments name, in order: files, pictures of folders, matches of patterns.

    Raises OSError for an unreadable file, a pattern without a match, and a folder without a
    picture.
    """
    paths: list[Path] = []
    for argument in arguments:
        if not argument:
            raise FileNotFoundError("an image's path is empty")
        if not Path(argument).exists() and has_magic(argument):
            if not (found := sorted(glob(argument, recursive=True))):
                raise FileNotFoundError(f"{argument}: matches no file")
            paths += [path for match in found for path in _pictures_at(Path(match))]
        else:
            paths += _pictures_at(Path(argument))
    return paths


def _pictures_at(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            if path.is_file() or not path.exists():  # Pipes can be read only once.
                path.open("rb").close()
            return [path]
        found = sorted(
            each
            for each in path.iterdir()
            if each.suffix.lower() in SUFFIXES
            and not each.name.startswith(".")
            and not each.is_dir()
        )
        for each in found:
            each.open("rb").close()
    except OSError as error:
        raise OSError(f"{error.filename or path}: {error.strerror}") from error
    if not found:
        raise FileNotFoundError(f"{path}: the folder holds no file that ends in {_NAMED_SUFFIXES}")
    return found


def places(target: Path, images: Sequence[Path]) -> list[Path]:
    """The file of each image's certificate.

    It is `target` for one image. For several, and where `target` is a folder, it is `NAME.json` in
    that folder, which is made; NAME is the image's file name with its suffix.

    Raises OSError for a folder that is missing or cannot be made, and for two images of one name.
    """
    if len(images) == 1 and not target.is_dir():
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target}: there is no folder {target.parent}")
        return [target]
    names = [f"{image.name}.json" for image in images]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise FileExistsError(f"{target}: two images would have the certificate {repeated}")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{target}: {error.strerror}: several images need a folder") from error
    return [target / name for name in names]


def save(file: Path, certificate: SignedCertificate) -> None:
    """Write the certificate, as `vouchsafe verify` reads it."""
    file.write_text(certificate.model_dump_json(indent=2) + "\n", "utf-8")
