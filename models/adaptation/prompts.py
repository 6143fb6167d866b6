"""Checks of a plan's prompts that need the networks' own code, before any network is loaded."""

from __future__ import annotations

from models.adaptation.limits import check_prompt
from models.adaptation.plan import Plan
from models.bundle import MODELS
from models.classifiers.registry import PROMPT_TOKENS
from models.zoo.registry import ClassifierSet


def check_head(plan: Plan, head: ClassifierSet) -> None:
    """Raises PlanError for a prompt that the classifier would truncate, if not checked before."""
    if head.tokens is None and head.labels is None:
        captions = plan.captions()
        counted, most = PROMPT_TOKENS[head.kind](MODELS / head.folder, captions)
        for index, (word, caption) in enumerate(zip(plan.words, captions, strict=True)):
            field = plan.field_of(index)
            check_prompt(field, word, caption, "classifier", counted[index], most)
