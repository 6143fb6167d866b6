"""A task's artifact on disk: a manifest and safetensors files, each with its hash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from models.base_network import MODELS as MODELS
from models.base_network import Base as Base
from models.files import PACKAGE, flush, sha256_of, verified_copies, verify
from models.files import BundleError as BundleError
from models.kinds import BUNDLE_FILES, SAFETENSORS, classifier_kinds, denoiser_kinds, libraries
from models.kinds import PROMPT_STATES as PROMPT_STATES
from models.rows import Numerics

SCHEMA = 2
ADAPTER = "adapter.safetensors"
"""A personalized bundle's file with the adapter of the denoiser's attention (LoRA)."""
TUNED = "classifier.safetensors"
"""A fine-tuned bundle's file of the classifier's own weights, in float32."""
WRITERS = ".lock"
"""A folder's lock file. Every writer of a bundle in the folder holds it shared.

A process that holds it alone may remove the half-written bundles: their writers are dead.
"""
DEFAULT_TASK = PACKAGE / "nano" / "task"
"""The bundle that ships with the project: CIFAR-10's ten labels on the nano set."""


@dataclass(frozen=True)
class Bundle:
    """A task: its words, its networks and the settings that go into every certificate.

    `files` maps names within the folder to SHA-256 (hex). `resolution` is in pixels.
    `largest_sigma` is the strongest noise, in [0,1] pixel units, that the denoiser supports.
    `adaptation` holds the settings of the adaptation, and is empty where nothing was adapted.
    `figures` holds what was measured. `prompts` maps labels to their words in the template, where
    these differ from the label.
    """

    id: str
    labels: tuple[str, ...]
    template: str
    prompt: str
    k: float
    resolution: int
    largest_sigma: float
    denoiser: Base
    classifier: Base
    licence: str
    files: Mapping[str, str]
    name: str = ""
    adaptation: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def words(self) -> tuple[str, ...]:
        """The word in the template for each label: its prompt, else the label itself."""
        return tuple(self.prompts.get(label, label) for label in self.labels)

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        described = {"schema": SCHEMA, **asdict(self)}
        del described["folder"]
        if not self.prompts:
            del described["prompts"]
        return described

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """A folder with verified copies of the bundle's own files.

        Raises BundleError where a file no longer has the hash that the manifest stated when it was
        read.
        """
        with verified_copies(self.folder, self.files) as copies:
            yield copies

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that can change a response.

        The input is the canonical manifest without the task's name and figures. Through its hashes
        it includes every weight.
        """
        hashed = self.manifest
        del hashed["name"], hashed["figures"]
        return _digest(hashed)

    def numerics(self, of_machine: Numerics) -> Numerics:
        """A machine's numerics for this bundle: its runtime names the packages used beside torch.

        These are onnxruntime, and the packages that add this bundle's kinds of networks.
        """
        used = libraries(self.denoiser.kind, self.classifier.kind)
        return replace(of_machine, runtime=", ".join([of_machine.runtime, *used]))

    def served_digest(self, numerics: Mapping[str, Any]) -> str:
        """SHA-256 (hex) of the bundle together with the numerics of a worker that computes it."""
        return served_digest(self.digest, numerics)


def served_digest(task_digest: str, numerics: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a bundle's digest together with the numerics of a worker."""
    return _digest({"bundle": task_digest, "numerics": dict(numerics)})


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_bundle(folder: Path) -> Bundle:
    """The bundle of a folder, verified.

    A manifest of schema 1, which had no adaptation, is read as an unadapted one of this schema.
    Raises BundleError for:

    - a missing, linked or unreadable manifest, or one of an unknown schema version;
    - unknown or missing fields;
    - fewer than two labels, or two equal ones;
    - a file that is absent, linked, not safetensors, outside the folder, or of another hash;
    - an unknown kind of network, or a network or adapted part whose file is not listed.
    """
    manifest = folder / "manifest.json"
    if folder.is_symlink() or manifest.is_symlink():
        raise BundleError(f"{manifest}: is a link, or its folder is")
    try:
        described = json.loads(manifest.read_text(), parse_constant=_refused)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{manifest}: cannot be read: {error}") from error
    schema = described.pop("schema", None) if isinstance(described, dict) else None
    if schema == 1:
        described = {"name": "", "adaptation": {}, **described}
    elif schema != SCHEMA:
        raise BundleError(f"{manifest}: schema version {schema!r}; this release reads 1, {SCHEMA}")
    described = {"prompts": {}, **described}
    known = {f.name for f in fields(Bundle)} - {"folder"}
    if described.keys() != known:
        odd = sorted(described.keys() ^ known)
        raise BundleError(f"{manifest}: unknown or missing fields {', '.join(odd)}")
    _check_types(manifest, described)
    try:
        for name, sha256 in described["files"].items():
            if not name.endswith(SAFETENSORS):
                raise BundleError(f"{folder}: {name!r} is not a safetensors file")
            verify(folder, name, sha256)
        described["labels"] = tuple(described["labels"])
        for network in ("denoiser", "classifier"):
            described[network] = Base(**described[network])
        bundle = Bundle(**described, folder=folder)
    except (TypeError, AttributeError) as error:
        raise BundleError(f"{manifest}: a field has the wrong shape: {error}") from error
    _check_kinds(manifest, bundle)
    for part, name in (("steps", ADAPTER), ("epochs", TUNED)):
        if bundle.adaptation.get(part) and name not in bundle.files:
            raise BundleError(f"{manifest}: was adapted with {part}, but lists no {name}")
    return bundle


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")


_TYPES: dict[str, type | tuple[type, ...]] = {
    "id": str, "labels": list, "template": str, "prompt": str, "k": (int, float),
    "resolution": int, "largest_sigma": (int, float), "licence": str, "files": dict, "name": str,
    "adaptation": dict, "figures": dict, "prompts": dict,
}  # fmt: skip


def _check_types(manifest: Path, described: Mapping[str, Any]) -> None:
    for name, kind in _TYPES.items():
        value = described[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BundleError(f"{manifest}: the field {name} holds {str(value)[:80]!r}")
    labels = described["labels"]
    odd = [label for label in labels if not isinstance(label, str)]
    if odd:
        raise BundleError(f"{manifest}: the field labels holds {str(odd)[:80]!r}")
    if len(labels) < 2:
        raise BundleError(f"{manifest}: the field labels holds {len(labels)}; the smallest is 2")
    if twice := [label for label, times in Counter(labels).items() if times > 1]:
        raise BundleError(f"{manifest}: the field labels holds {str(twice[0])[:80]!r} twice")
    for label, word in described["prompts"].items():
        if label not in described["labels"] or not isinstance(word, str):
            raise BundleError(f"{manifest}: the field prompts holds {label!r}: {str(word)[:80]!r}")


def _check_kinds(manifest: Path, bundle: Bundle) -> None:
    known = denoiser_kinds(), classifier_kinds()
    for network, kinds in zip(("denoiser", "classifier"), known, strict=True):
        kind = getattr(bundle, network).kind
        if kind not in kinds:
            raise BundleError(
                f"{manifest}: the {network} is {kind!r}, not of {', '.join(kinds)}; a package that "
                "adds it must be installed here"
            )
    for name in BUNDLE_FILES.get(bundle.denoiser.kind, ()):
        if name not in bundle.files:
            raise BundleError(f"{manifest}: the denoiser needs {name}, which is not listed")


def write_bundle(folder: Path, bundle: Bundle, sources: Mapping[str, Path]) -> Bundle:
    """The published bundle: copied under a temporary name, fsynced, then renamed to `folder`.

    `sources` maps names within the bundle to the safetensors files to copy. Their hashes become the
    bundle's `files`. Raises BundleError where the folder exists.
    """
    if folder.exists():
        raise BundleError(f"{folder}: exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / WRITERS).open("a") as writers:
        fcntl.flock(writers, fcntl.LOCK_SH)
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{folder.name}-", dir=folder.parent))
        try:
            whole = _written(partial, replace(bundle, folder=folder), sources)
            partial.rename(folder)
            flush(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return whole


def _written(partial: Path, bundle: Bundle, sources: Mapping[str, Path]) -> Bundle:
    for name, source in sources.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial / name)
    whole = replace(bundle, files={name: sha256_of(partial / name) for name in sources})
    manifest = json.dumps(whole.manifest, indent=2, allow_nan=False)
    (partial / "manifest.json").write_text(manifest + "\n")
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    partial.chmod(0o755)
    return whole
