"""Plans and statuses of adaptation jobs: plain documents, without torch.

A job's folder holds `plan.json` (written once), `status.json` (replaced by the process that runs
the job), `references/` (a PNG and a JSON an image), and each training's checkpoint, `*.loss.jsonl`
and `validation.jsonl`.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from models.adaptation.limits import (
    EPOCHS,
    MOST_REFERENCES,
    SHOTS,
    STEPS,
    PlanError,
    check_between,
    check_head_labels,
    check_prompt,
    check_work,
    checked_labels,
    checked_template,
    quoted,
    usable,
)
from models.bundle import MODELS
from models.files import written_whole
from models.zoo.captions import clean_caption
from models.zoo.registry import CLASSIFIER_SETS, DENOISER_SETS, ClassifierSet, DenoiserSet

PLAN, STATUS, LOCK = "plan.json", "status.json", "lock"
REFERENCES = "references"
STAGES = ("synthesizing", "personalizing", "finetuning", "evaluating")
MEASURED_ON = (
    "its own references, the images it was made from: no estimate of accuracy on photographs"
)
"""The source of a task's figures, as `measured_on`."""
UNATTENDED = 3
"""Exit status of a job's process that ended because its supervisor is gone."""
_PLAIN_WORD = "thing"
"""A word that the cleaning of captions does not change."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a task's bundle depends on, beyond networks and profile of its sets.

    Create one with `Plan.checked`. `steps` of personalization and `epochs` of fine-tuning: 0 omits
    that part. `prompts` maps labels to their words in the template, where these differ from the
    label.
    """

    labels: tuple[str, ...]
    template: str
    denoiser: str
    classifier: str
    shots: int
    steps: int
    epochs: int
    seed: int = 0
    prompts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def checked(
        cls,
        labels: Sequence[str | tuple[str, str]],
        *,
        template: str | None = None,
        denoiser: str = "nano",
        classifier: str | None = None,
        shots: int | None = None,
        steps: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
        allow_unknown_labels: bool = False,
        models_dir: Path | None = None,
    ) -> Self:
        """A plan with the set's own defaults where None is given, its words in Unicode's NFC.

        `labels` are labels, or pairs of a label and its prompt. Raises PlanError for:

        - the first field that is outside its limits;
        - words that the text encoder would not read as they are;
        - a set whose networks are not complete in `models_dir`.
        """
        cascade: DenoiserSet = usable("denoiser", DENOISER_SETS, denoiser, models_dir)
        classifier = classifier or cascade.classifier
        head: ClassifierSet = usable("classifier", CLASSIFIER_SETS, classifier, models_dir)
        names, prompts = checked_labels(labels)
        check_head_labels(classifier, head, names)
        if shots is None:
            shots = min(cascade.shots, MOST_REFERENCES // len(names))
        check_between("shots", shots, SHOTS)
        check_between("steps", steps := cascade.steps if steps is None else steps, STEPS)
        check_between("epochs", epochs := cascade.epochs if epochs is None else epochs, EPOCHS)
        check_between("seed", seed, (0, 2**31 - 1))
        template = checked_template(cascade.template if template is None else template)
        check_work(len(names), shots, epochs)
        plan = cls(names, template, denoiser, classifier, shots, steps, epochs, seed, prompts)
        _check_tokens(plan, cascade, head)
        _check_read(plan)
        if cascade.words is not None and not allow_unknown_labels:
            _check_known(plan, cascade.words)
        return plan

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The plan of a job's folder."""
        described = json.loads((folder / PLAN).read_text())["plan"]
        return cls(**{**described, "labels": tuple(described["labels"])})

    def identity(self, secret: bytes) -> str:
        """The task's id: equal for equal plans, and not predictable without the secret."""
        canonical = json.dumps(self.document, sort_keys=True, separators=(",", ":"))
        digest = hmac.new(secret, b"task\0" + canonical.encode(), hashlib.sha256)
        return digest.hexdigest()[:32]

    @property
    def document(self) -> dict[str, Any]:
        """The plan's part of `plan.json`; without `prompts` where there are none."""
        described = asdict(self)
        if not self.prompts:
            del described["prompts"]
        return described

    @property
    def words(self) -> tuple[str, ...]:
        """The word in the template for each label: its prompt, else the label itself."""
        return tuple(self.prompts.get(label, label) for label in self.labels)

    def captions(self) -> list[str]:
        """The template with each label's word, for the cascade and the classifier."""
        return [self.template.format(word) for word in self.words]

    def field_of(self, label: int) -> str:
        """The name of the field that holds a label's word."""
        return f"labels.{label}.prompt" if self.labels[label] in self.prompts else f"labels.{label}"

    def seed_of(self, label: int, shot: int) -> int:
        """The seed of one reference image, below 2^63.

        It follows from words, set, the plan's seed and the shot. So a plan with more shots has the
        same first ones.
        """
        parts = [self.template.format(self.words[label]), self.denoiser, self.seed, shot]
        canonical = json.dumps(parts)
        return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") >> 1


def name_of(folder: Path) -> str:
    """The task's name in a job's folder; it may be empty."""
    return str(json.loads((folder / PLAN).read_text())["name"])


def _check_tokens(plan: Plan, cascade: DenoiserSet, head: ClassifierSet) -> None:
    filled = [("template", cascade.identifier)]
    filled += ((plan.field_of(i), word) for i, word in enumerate(plan.words))
    for name, word in filled:
        prompt = plan.template.format(word)
        tokens = _count(cascade, prompt)
        check_prompt(name, word, prompt, "text encoder", tokens, cascade.prompt_tokens)
        if head.tokens is not None:
            tokens = head.tokens(MODELS / head.folder, prompt)
            check_prompt(name, word, prompt, "classifier", tokens, head.prompt_tokens)


def _count(cascade: DenoiserSet, prompt: str) -> int:
    try:
        return cascade.tokens(cascade.folders[0], prompt)
    except (OSError, RuntimeError) as error:
        folder = cascade.folders[0] / "tokenizer"
        raise PlanError("denoiser", f"{folder}: the tokenizer cannot be read: {error}") from error


def _check_read(plan: Plan) -> None:
    """Raises PlanError for words that caption cleaning changes or makes equal.

    Changes of letter case and white space are allowed.
    """
    _as_read("template", plan.template, plan.template.format(_PLAIN_WORD))
    seen: dict[str, int] = {}
    for index, (word, caption) in enumerate(zip(plan.words, plan.captions(), strict=True)):
        field = plan.field_of(index)
        read = _as_read(field, word, caption)
        first = seen.setdefault(read.casefold(), index)
        if first != index:
            other = f"{plan.field_of(first)}: {quoted(read)}"
            detail = f"{field} is {quoted(word)}; it would be read as {other}"
            raise PlanError(field, detail, word)


def _as_read(field: str, word: str, caption: str) -> str:
    """The caption as the text encoder reads it, with `word` in it."""
    try:
        read = clean_caption(caption)
    except ValueError as error:
        raise PlanError(field, f"{field} is {quoted(word)}; {error}", word) from error
    if _without_case_and_space(read) != _without_case_and_space(caption):
        detail = f"{field} is {quoted(word)}; {quoted(caption)} would be read as {quoted(read)}. "
        part = "Choose one" if field == "template" else "Give the label a prompt"
        raise PlanError(field, f"{detail}{part} that is read as it stands", word)
    return read


def _without_case_and_space(text: str) -> str:
    return unicodedata.normalize("NFC", "".join(text.casefold().split()))


def _check_known(plan: Plan, known: Sequence[str]) -> None:
    for index, word in enumerate(plan.words):
        if word.casefold() not in known:
            raise PlanError(
                plan.field_of(index),
                f"{quoted(word)} is not a word that {plan.denoiser} was trained on: "
                f"{', '.join(known)}. Send allow_unknown_labels to insist; "
                "its images may then show anything",
                word,
            )


@dataclass(frozen=True, slots=True)
class Status:
    """The progress of a job.

    - `state`: queued, running, ready, failed or cancelled;
    - `stage`: one of STAGES or None;
    - `progress`: from 0 to 1;
    - `losses`: the last of each stage;
    - `problem`: a kind, and a detail with the remedy;
    - `started`, `finished`: in Unix seconds;
    - `attempts`: crashes of its process or worker since its progress last exceeded `furthest`.
    """

    state: str = "queued"
    stage: str | None = None
    progress: float = 0.0
    eta_seconds: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    problem: Mapping[str, Any] | None = None
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    furthest: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.state in ("ready", "failed", "cancelled")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """A job's status; queued where there is none yet. Fields of later releases are ignored."""
        try:
            described = json.loads((folder / STATUS).read_text())
        except FileNotFoundError:
            return cls()
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in described.items() if name in known})

    def write(self, folder: Path) -> None:
        """Replace the folder's status atomically."""
        write_json(folder / STATUS, asdict(self))

    def changed(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)


def write_json(path: Path, document: object) -> None:
    """Replace a file atomically."""
    text = json.dumps(document, indent=2, allow_nan=False)
    with written_whole(path) as partial:
        partial.write_text(text + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a job's folder; waits while another process holds it."""
    with (folder / LOCK).open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
