"""Outcomes of attacked images, and the figures of an attack beside those of certificates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Self

import numpy as np

from models.evaluation.records import by_label
from models.evaluation.results import DIGITS, Run, certified_at, share


@dataclass(frozen=True, slots=True)
class AttackRecord:
    """What the classifier answers at an image that an attack found, or at the clean one.

    `predict` is PREDICT's label, -1 for an abstention, by `votes`; without noise it is the
    classifier's label, as `base` always is. `norm` (l2, [0,1] units) is the distance from the clean
    image, 0.0 for the clean image and where no attack was made.
    """

    index: int
    name: str
    truth: int
    predict: int
    base: int
    norm: float
    votes: Mapping[int, int]
    seconds: float

    HEADER: ClassVar[str] = "idx\tlabel\tpredict\tbase\tnorm\tcorrect\ttime\n"

    @property
    def correct(self) -> bool:
        """Whether the true label is answered; an abstention is not."""
        return self.predict == self.truth

    @property
    def empirical(self) -> bool:
        """Whether the true label is answered, by the classifier alone on abstention.

        At clean images this is the paper's empirical clean accuracy (method.md 6).
        """
        return (self.base if self.predict < 0 else self.predict) == self.truth

    def line(self) -> str:
        """The image's line in a log; the norm is rounded up."""
        norm = ceil(self.norm * 1e6) / 1e6
        return (
            f"{self.index}\t{self.truth}\t{self.predict}\t{self.base}\t{norm:.6f}"
            f"\t{int(self.correct)}\t{self.seconds:.3f}\n"
        )

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """See `Line`."""
        return cls(**document | {"votes": by_label(document["votes"])})


def attack_figures(run: Run, attacked: Sequence[AttackRecord], eps: float | None) -> dict[str, Any]:
    """What an attack within eps leaves of a run's answers, as shares of the same images.

    `robust` is the share of right answers, `abstained` and `misled` the others. `certified` is the
    run's certified accuracy at eps (l2; None for an attack in another norm). `contradicted` lists
    the images whose certificate excludes what the attack found: another label, closer than the
    radius.
    """
    found: dict[str, Any] = {
        "robust": share(np.array([each.correct for each in attacked])),
        "abstained": share(np.array([each.predict < 0 for each in attacked])),
        "misled": share(np.array([each.predict >= 0 and not each.correct for each in attacked])),
        "mean norm": round(float(np.mean([each.norm for each in attacked])), DIGITS),
        "seconds": round(sum(each.seconds for each in attacked), 1),
    }
    if run.certifies:
        if eps is not None:
            found["certified"] = share(certified_at(run.records, eps))
        pairs = zip(run.records, attacked, strict=True)
        found["contradicted"] = [
            each.index
            for record, each in pairs
            if record.radius > each.norm and 0 <= each.predict != record.predict
        ]
    return found


def clean_figures(clean: Sequence[AttackRecord]) -> dict[str, Any]:
    """PREDICT's accuracy at the clean images: abstentions as wrong, and by the classifier alone."""
    return {
        "predict": share(np.array([each.correct for each in clean])),
        "empirical clean": share(np.array([each.empirical for each in clean])),
    }
