"""Vocabulary of nano: CIFAR-10's ten classes, their common synonyms, and sentence templates."""

from __future__ import annotations

import random

SYNONYMS: dict[str, tuple[str, ...]] = {
    "airplane": ("airplane", "plane", "aeroplane", "jet", "airliner", "aircraft"),
    "automobile": ("automobile", "car", "sedan", "motorcar", "sports car"),
    "bird": ("bird", "songbird", "small bird", "wild bird"),
    "cat": ("cat", "kitten", "kitty", "house cat"),
    "deer": ("deer", "stag", "doe", "fawn"),
    "dog": ("dog", "puppy", "hound", "doggy"),
    "frog": ("frog", "toad", "tree frog", "bullfrog"),
    "horse": ("horse", "pony", "stallion", "mare"),
    "ship": ("ship", "boat", "vessel", "cargo ship", "motorboat"),
    "truck": ("truck", "lorry", "fire truck", "dump truck"),
}
TEMPLATES = (
    "This is a photo of a {}.",
    "A photo of a {}.",
    "A picture of a {}.",
    "An image of a {}.",
    "A small photo of the {}.",
    "A blurry photo of a {}.",
    "A close-up photo of a {}.",
    "{}",
)
DEFAULT_TEMPLATE = TEMPLATES[0]
BLANK = " "
"""The word in the template where no label is given (Choi et al. 2024, Eq. 9)."""


def vocabulary() -> tuple[str, ...]:
    """Every label nano was trained on, synonyms included."""
    return tuple(word for words in SYNONYMS.values() for word in words)


def caption(label: str, draw: random.Random) -> str:
    """One sentence for a CIFAR-10 class: the plain name half of the time, else a synonym."""
    word = label if draw.random() < 0.5 else draw.choice(SYNONYMS[label])
    return draw.choice(TEMPLATES).format(word)


def blank_captions() -> tuple[str, ...]:
    """Every template with a blank in it; smoothing uses the first."""
    return tuple(template.format(BLANK) for template in TEMPLATES)
