"""What only the networks' own code can tell of a plan's prompts, before any network is loaded."""

from __future__ import annotations

from models.adaptation.plan import Plan, PlanError, check_prompt
from models.bundle import MODELS
from models.classifier import open_clip_tokens
from models.denoiser import clean_prompts
from models.sets import ClassifierSet


def check_head(plan: Plan, head: ClassifierSet) -> None:
    """Raises PlanError for a prompt that the classifier would cut, where nobody could tell yet."""
    if head.tokens is None:
        counted = open_clip_tokens(MODELS / head.folder, plan.prompts())
        for index, (label, prompt) in enumerate(zip(plan.labels, plan.prompts(), strict=True)):
            check_prompt(f"labels.{index}", label, prompt, "classifier", counted[index], head)


def check_distinct(plan: Plan, blank: str) -> None:
    """Raises PlanError for a label of which the text encoder is told nothing of its own."""
    cleaned = clean_prompts([blank, *plan.prompts()])
    for index, prompt in enumerate(cleaned[1:]):
        first = cleaned.index(prompt)
        if first != index + 1:
            other = f"labels.{first - 1} ({plan.labels[first - 1]!r})" if first else "no label"
            raise PlanError(
                f"labels.{index}",
                f"labels.{index} ({plan.labels[index]!r}) reads as {prompt!r}, the same as {other}",
                plan.labels[index],
            )
