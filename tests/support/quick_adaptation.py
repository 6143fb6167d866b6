"""The real adaptation process, with few steps of sampling and few rows to evaluate on."""

from __future__ import annotations

from dataclasses import replace

from models.adaptation import profiles, references
from models.adaptation.job import main
from models.adaptation.profiles import Adaptation
from models.adaptation.synthesize import Sampling
from models.training import Profile

EVALUATED_ROWS = 3


def quick(ways: Adaptation) -> Adaptation:
    """The same profile with the least of each."""
    profile = Profile(steps=2, batch=2, learning_rate=1e-2, log_every=1, checkpoint_every=1)
    return replace(
        ways,
        sampling=Sampling(steps=2, upscale_steps=2, chunk=2),
        personalization=replace(
            ways.personalization, profile=profile, micro_batch=1, validation_rows=2
        ),
    )


if __name__ == "__main__":
    profiles.ADAPTATIONS.update({name: quick(w) for name, w in profiles.ADAPTATIONS.items()})
    references.EVALUATED_ROWS = EVALUATED_ROWS
    main()
