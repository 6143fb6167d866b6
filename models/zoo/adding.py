"""Adds networks of one's own: copied, checked, tried, then published as a task."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_log
from safetensors.torch import save_file
from transformers.utils import logging as transformers_log

from models import kinds
from models.adaptation.limits import PlanError, checked_labels, checked_template, usable
from models.adaptation.profiles import adaptation_of
from models.adaptation.synthesize import encode
from models.bundle import PROMPT_STATES, Base, Bundle, write_bundle
from models.classifiers.base import Description
from models.classifiers.registry import DESCRIPTIONS, PROMPT_TOKENS
from models.denoisers.prompts import clean_prompts
from models.files import flush, written_whole
from models.nano.captions import BLANK, DEFAULT_TEMPLATE
from models.noise import SIGMA_RANGE
from models.zoo.copying import Source, copied
from models.zoo.own import CLASSIFIER, DENOISER, REGISTRATION, Registration, folder_of
from models.zoo.registry import DENOISER_SETS, DenoiserSet

RESOLUTIONS = (8, 2_048)
"""Smallest and largest side of certified images, in pixels."""
FFDNET_SIGMA = 75 / 255
"""Strongest noise of FFDNet's training."""
LARGEST_SIGMA, K = 1.0, 1.8
_PARTIAL, _SCRATCH = ".partial-", "vouchsafe-"
_COPIES = re.compile(rf"/\S*/(?:{re.escape(_PARTIAL)}|{_SCRATCH})[^/\s]+/")
"""Paths of copies, which are gone before a message about them is read."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to add, as `vouchsafe models add` takes it; None stands for a default.

    `classifier` and `denoiser` are KIND:PATH, a denoiser set's name, or a kind that needs no files.
    `labels` are labels, or pairs of a label and its prompt. `resolution` is in pixels.
    """

    name: str
    classifier: str
    labels: Sequence[str | tuple[str, str]] | None = None
    template: str | None = None
    denoiser: str = "none"
    resolution: int | None = None
    largest_sigma: float | None = None
    k: float | None = None


@dataclass(frozen=True)
class Addition:
    """Copied networks and the task that they make, until `publish` gives both their places."""

    bundle: Bundle
    registration: Registration
    copies: Path
    place: Path
    sources: Mapping[str, Path] = field(default_factory=dict)

    def publish(self, tasks: Path) -> Bundle:
        """The task, published in `tasks`; its networks lie in their place then."""
        with written_whole(self.copies / REGISTRATION) as partial:
            partial.write_text(json.dumps(self.registration.document(), indent=2) + "\n")
        for path in [*self.copies.rglob("*"), self.copies]:
            flush(path)
        self.copies.chmod(0o755)
        self.copies.rename(self.place)
        try:
            flush(self.place.parent)
            bundle = replace(
                self.bundle,
                denoiser=self._placed(self.bundle.denoiser),
                classifier=self._placed(self.bundle.classifier),
            )
            return write_bundle(tasks / bundle.id, bundle, self.sources)
        except BaseException:
            shutil.rmtree(self.place, ignore_errors=True)
            raise

    def _placed(self, base: Base) -> Base:
        return replace(base, folder=base.folder.replace(str(self.copies), str(self.place)))


@contextmanager
def adding(
    wanted: Wanted, tasks: Path, models_dir: Path, device: torch.device
) -> Iterator[Addition]:
    """Networks copied below `models_dir` and a task of them, to be tried and then published.

    Unpublished copies are removed. One process at a time adds. Raises ValueError that names the
    field, the value and the limit.
    """
    diffusers_log.disable_progress_bar()
    transformers_log.disable_progress_bar()
    place = folder_of(models_dir, wanted.name)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (place.parent / ".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for left in place.parent.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left)
        if taken := next((path for path in (place, tasks / wanted.name) if path.exists()), None):
            raise ValueError(
                f"the name {wanted.name!r} is taken: {taken} exists; `vouchsafe models remove "
                f"{wanted.name}` removes it"
            )
        copies = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=place.parent))
        try:
            with tempfile.TemporaryDirectory(prefix=_SCRATCH) as scratch:
                yield _addition(wanted, copies, place, Path(scratch), models_dir, device)
        except ValueError as error:
            raise ValueError(_COPIES.sub("", str(error))) from error
        finally:
            shutil.rmtree(copies, ignore_errors=True)


def _addition(
    wanted: Wanted,
    copies: Path,
    place: Path,
    scratch: Path,
    models_dir: Path,
    device: torch.device,
) -> Addition:
    classifier = Source.read("classifier", wanted.classifier)
    head = copied(classifier, kinds.CLASSIFIER_FILES.get(classifier.kind), copies / CLASSIFIER)
    said = _said(wanted, head)
    names, prompts = _labels(wanted, said)
    cascade: DenoiserSet | None = None
    if ":" in wanted.denoiser or wanted.denoiser in kinds.denoiser_kinds():
        source = Source.read("denoiser", wanted.denoiser)
        denoiser = copied(source, kinds.DENOISER_FILES.get(source.kind), copies / DENOISER)
        stage1, stage2 = copies / DENOISER / "stage1", str(copies / DENOISER / "stage2")
    else:
        cascade = _cascade(wanted.denoiser, models_dir)
        denoiser, stage1, stage2 = Base("super-resolution"), cascade.folders[0], cascade.stage2
    template = wanted.template or (cascade.template if cascade else DEFAULT_TEMPLATE)
    sources = {}
    if denoiser.kind == "super-resolution":
        denoiser = Base.of(denoiser.kind, stage2, ["unet/*", "scheduler/*"])
        sources[PROMPT_STATES] = scratch / PROMPT_STATES
        states = encode(
            stage1, [template.format(BLANK)], device, adaptation_of(wanted.denoiser).text_dtype
        )
        save_file({"states": states[0].clone()}, sources[PROMPT_STATES])
    bundle = Bundle(
        id=wanted.name,
        labels=names,
        template=checked_template(template),
        prompt=clean_prompts([template.format(BLANK)])[0],
        k=_k(wanted, denoiser.kind, cascade),
        resolution=_resolution(wanted, denoiser, said, cascade),
        largest_sigma=_largest_sigma(wanted, denoiser.kind, cascade),
        denoiser=denoiser,
        classifier=head,
        licence="; ".join(
            [
                *([cascade.licence] if cascade else []),
                f"{wanted.name}'s own networks: as their makers license them",
            ]
        ),
        files={},
        name=wanted.name,
        prompts=prompts,
    )
    _check_prompts(bundle, said)
    registration = Registration(
        classifier=head.kind,
        labels=None if said is not None and said.takes_words else names,
        denoiser=None if cascade or denoiser.kind == "none" else denoiser.kind,
        resolution=bundle.resolution,
        largest_sigma=bundle.largest_sigma,
        k=bundle.k,
        template=bundle.template,
    )
    written = write_bundle(scratch / wanted.name, bundle, sources)
    return Addition(written, registration, copies, place, sources)


def _said(wanted: Wanted, head: Base) -> Description | None:
    """What the classifier's folder says; None for a package's kind."""
    if head.kind not in DESCRIPTIONS:
        return None
    try:
        return DESCRIPTIONS[head.kind](Path(head.folder))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"--classifier is {wanted.classifier}: its configuration is not one of {head.kind} "
            f"({reason})"
        ) from error


def _cascade(name: str, models_dir: Path) -> DenoiserSet:
    try:
        found: DenoiserSet = usable("denoiser", DENOISER_SETS, name, models_dir)
    except PlanError as error:
        advice = f"or one of none and KIND:PATH with a kind of {', '.join(kinds.denoiser_kinds())}"
        raise ValueError(f"--denoiser: {error}; {advice}") from error
    return found


def _labels(wanted: Wanted, said: Description | None) -> tuple[tuple[str, ...], dict[str, str]]:
    given = wanted.labels
    if given is None:
        if said is None or said.labels is None:
            raise ValueError(
                f"--labels is missing: {wanted.classifier} names no labels itself; give a file "
                "with one label a line"
            )
        given = said.labels
    try:
        return checked_labels(given)
    except PlanError as error:
        raise ValueError(f"--labels: {error}") from error


def _k(wanted: Wanted, kind: str, cascade: DenoiserSet | None) -> float:
    if wanted.k is None:
        return cascade.k if cascade else K if kind == "super-resolution" else 1.0
    if kind != "super-resolution" or not 0 < wanted.k <= 100:
        raise ValueError(
            f"--k is {wanted.k} for the denoiser {kind}; it must be above 0 and at most 100, and "
            "is for super-resolution only"
        )
    return wanted.k


def _resolution(
    wanted: Wanted, denoiser: Base, said: Description | None, cascade: DenoiserSet | None
) -> int:
    """The given side, else the denoiser's own, else the classifier's."""
    own = cascade.resolution if cascade else None
    if denoiser.kind == "unconditional":
        config = json.loads((Path(denoiser.folder) / "unet" / "config.json").read_text())
        own = config.get("sample_size")
    found = wanted.resolution or own or (said.resolution if said else None)
    lowest, highest = RESOLUTIONS
    if found is None:
        raise ValueError(
            f"--resolution is missing: the networks name none; {lowest} to {highest} pixels"
        )
    if not isinstance(found, int) or not lowest <= found <= highest:
        raise ValueError(f"--resolution is {found}; it must be {lowest} to {highest} pixels")
    return found


def _largest_sigma(wanted: Wanted, kind: str, cascade: DenoiserSet | None) -> float:
    default = cascade.largest_sigma if cascade else LARGEST_SIGMA
    if kind == "ffdnet":
        default = FFDNET_SIGMA
    found = default if wanted.largest_sigma is None else wanted.largest_sigma
    lowest, highest = SIGMA_RANGE
    if not lowest <= found <= highest:
        raise ValueError(f"--largest-sigma is {found}; it must be {lowest} to {highest}")
    return found


def _check_prompts(bundle: Bundle, said: Description | None) -> None:
    """Raises ValueError for a prompt that a zero-shot classifier would cut."""
    if said is None or not said.takes_words:
        return
    prompts = [bundle.template.format(word) for word in bundle.words]
    counts, most = PROMPT_TOKENS[bundle.classifier.kind](Path(bundle.classifier.folder), prompts)
    for prompt, count in zip(prompts, counts, strict=True):
        if count > most:
            raise ValueError(f"--labels: the prompt {prompt!r} has {count} tokens; at most {most}")
