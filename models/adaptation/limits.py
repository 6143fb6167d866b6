"""Limits of a plan's fields, and the checks that raise PlanError beyond them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.kinds import TUNABLE_KINDS
from models.zoo import own
from models.zoo.inventory import trouble
from models.zoo.registry import ClassifierSet

LABELS = (2, 1_000)
"""Smallest and largest number of labels of a task."""
LABEL_LENGTH = 128
TEMPLATE_LENGTH = 256
NAME_LENGTH = 128
SHOTS, STEPS, EPOCHS = (1, 64), (0, 10_000), (0, 1_000)
"""Limits of reference images per class, personalization steps and fine-tuning epochs."""
MOST_REFERENCES = 10_000
"""Largest number of reference images of a task."""
_LABELS_SHOWN = 20
MOST_TUNED = 1_000_000
"""Largest number of denoised references in fine-tuning: epochs times references."""


class PlanError(ValueError):
    """An invalid field of a plan; `field`, `value` and `limit` are machine-readable."""

    def __init__(self, field: str, detail: str, value: object = None, limit: Any = None) -> None:
        super().__init__(detail)
        self.field, self.value, self.limit = field, value, limit


def usable(field: str, known: Mapping[str, Any], name: str, models_dir: Path | None) -> Any:
    """The set of this name, or a registered name's; absolute folders in place of fetched ones.

    Raises PlanError for an unknown name, or networks that cannot be used.
    """
    if (found := known.get(name)) is None and models_dir is not None:
        try:
            found = own.SETS[field](name, models_dir)
        except ValueError as error:
            raise PlanError(field, f"The {field} {quoted(name)} cannot be used: {error}") from error
    if found is None:
        detail = f"There is no {field} set {quoted(name)}; there are {', '.join(sorted(known))}"
        raise PlanError(field, f"{detail}, and names that `vouchsafe models add` registers", name)
    if (why := trouble(found.fetched, models_dir)) is not None:
        raise PlanError(field, f"The {field} set {quoted(name)} cannot be used: {why}", name)
    return found.below(models_dir)


def quoted(text: str) -> str:
    """The text as a JSON string, for messages."""
    return json.dumps(text, ensure_ascii=False)


def check_between(field: str, value: int, limits: tuple[int, int]) -> None:
    """Raises PlanError for a value outside its limits."""
    lowest, highest = limits
    if not lowest <= value <= highest:
        limit = lowest if value < lowest else highest
        detail = f"{field} is {value}; it must be {lowest} to {highest}"
        raise PlanError(field, detail, value, limit)


def _checked_words(field: str, text: str, max_length: int) -> str:
    words = unicodedata.normalize("NFC", text).strip()
    if not 1 <= len(words) <= max_length:
        raise PlanError(
            field,
            f"{field} has {len(words)} characters; it must have 1 to {max_length}",
            text,
            max_length,
        )
    odd = next((c for c in words if unicodedata.category(c).startswith("C")), None)
    if odd is not None:
        raise PlanError(field, f"{field} holds the control character U+{ord(odd):04X}", text)
    return words


def checked_template(template: str) -> str:
    """The template in Unicode's NFC."""
    words = _checked_words("template", template, TEMPLATE_LENGTH)
    if words.count("{}") != 1 or words.count("{") != 1 or words.count("}") != 1:
        raise PlanError("template", "template must hold {} once and no other brace", template)
    return words


def checked_labels(
    labels: Sequence[str | tuple[str, str]],
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The labels, and the prompts of those whose prompt is not the label itself."""
    lowest, highest = LABELS
    if not lowest <= len(labels) <= highest:
        limit = lowest if len(labels) < lowest else highest
        detail = f"labels has {len(labels)} entries; it must have {lowest} to {highest}"
        raise PlanError("labels", detail, len(labels), limit)
    seen: dict[str, int] = {}
    names, prompts = [], {}
    for index, given in enumerate(labels):
        label, prompt = (given, given) if isinstance(given, str) else given
        names.append(name := _checked_words(f"labels.{index}", label, LABEL_LENGTH))
        first = seen.setdefault(name.casefold(), index)
        if first != index:
            detail = f"labels.{index} is the same as labels.{first}: {quoted(name)}"
            raise PlanError(f"labels.{index}", detail, name)
        word = _checked_words(f"labels.{index}.prompt", prompt, LABEL_LENGTH)
        if word != name:
            prompts[name] = word
    return tuple(names), prompts


def check_head_labels(name: str, head: ClassifierSet, labels: Sequence[str]) -> None:
    """Raises PlanError for a classifier that cannot be adapted to these labels."""
    if head.kind not in TUNABLE_KINDS:
        detail = f"The classifier {quoted(name)} cannot be adapted: a network of kind {head.kind} "
        raise PlanError("classifier", f"{detail}gives no gradients; the task serves it as it is")
    if head.labels is not None and tuple(labels) != head.labels:
        shown = ", ".join(head.labels[:_LABELS_SHOWN])
        more = len(head.labels) - _LABELS_SHOWN
        shown += f" and {more} more" if more > 0 else ""
        detail = f"The classifier {quoted(name)} has fixed labels, which labels must be: "
        raise PlanError("labels", f"{detail}{shown}", list(labels[:_LABELS_SHOWN]))


def check_work(labels: int, shots: int, epochs: int) -> None:
    """Raises PlanError for more references, or more rows to tune on, than a job may have."""
    references = labels * shots
    if references > MOST_REFERENCES:
        detail = f"{labels} labels with shots = {shots} make {references} references; at most "
        max_shots = MOST_REFERENCES // labels
        raise PlanError("shots", f"{detail}{MOST_REFERENCES} are made", shots, max_shots)
    if epochs * references > MOST_TUNED:
        detail = f"epochs = {epochs} over {references} references is {epochs * references} rows; "
        max_epochs = MOST_TUNED // references
        raise PlanError("epochs", f"{detail}at most {MOST_TUNED} are tuned on", epochs, max_epochs)


def check_prompt(field: str, word: str, prompt: str, reader: str, tokens: int, most: int) -> None:
    """Raises PlanError for a prompt of more tokens than its reader takes, `most`; 0 is any."""
    if most and tokens > most:
        raise PlanError(
            field,
            f"the prompt {quoted(prompt)} has {tokens} tokens; the {reader} reads at most {most}",
            word,
            most,
        )
