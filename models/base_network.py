"""Networks that bundles build on, as folders of hashed files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from models.files import PACKAGE, BundleError, base_folder, sha256_of, verified_copies, verify
from models.kinds import ONNX, PICKLES, SAFETENSORS, is_own

MODELS = PACKAGE


@dataclass(frozen=True, slots=True)
class Base:
    """A network that bundles build on: the adapter's `kind`, its folder, and the hash of each file.

    `folder` is absolute, or relative to this package for the sets that ship with it; `files` maps
    names within, weights and configurations alike, to SHA-256 (hex). `none` needs neither, and nor
    may the kind of an installed package.
    """

    kind: str
    folder: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kind: str,
        folder: str,
        patterns: Sequence[str],
        sha256: Callable[[Path], str] | None = None,
    ) -> Base:
        """A base network as it is on disk: every file that a glob pattern of `patterns` matches."""
        root, sha256 = MODELS / folder, sha256 or sha256_of
        found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
        names = {path.relative_to(root).as_posix(): sha256(path) for path in sorted(found)}
        return cls(kind, folder, names)

    def verified(self, models_dir: Path | None = None) -> Path:
        """The folder of the network, once its files have the hashes that the bundle states.

        `models_dir` is the folder of fetched networks. Raises BundleError for a folder outside
        `models_dir` and this package, a missing or changed file, and weights beside the listed
        ones.
        """
        folder = base_folder(self.folder, models_dir)
        self._check_listed(folder)
        for name, sha256 in self.files.items():
            verify(folder, name, sha256)
        for beside in sorted({(folder / name).parent for name in self.files}):
            for path in sorted([*beside.glob(f"*{SAFETENSORS}"), *beside.glob("*.index*.json")]):
                if path.relative_to(folder).as_posix() not in self.files:
                    raise BundleError(f"{path}: is not of the base network; remove it")
        pickles = [path.name for path in folder.rglob("*") if path.suffix in PICKLES]
        if self.folder and pickles:
            raise BundleError(f"{folder}: holds pickled files; remove {', '.join(sorted(pickles))}")
        return folder

    @contextmanager
    def opened(self, models_dir: Path | None = None) -> Iterator[Path]:
        """A folder with verified copies of the network's files, and no other file.

        Raises BundleError as `verified` does.
        """
        folder = base_folder(self.folder, models_dir)
        self._check_listed(folder)
        with verified_copies(folder, self.files) as copies:
            yield copies

    def _check_listed(self, folder: Path) -> None:
        if self.kind == "none" or not is_own(self.kind):
            return
        suffix = ONNX if self.kind == "onnx" else SAFETENSORS
        if not any(name.endswith(suffix) for name in self.files):
            what = suffix.removeprefix(".")
            raise BundleError(f"{folder}: no {what} file is listed for the base network")
