"""Tasks to evaluate on this machine: from labeled files to records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from models.bundle import Base, Bundle
from models.evaluation.records import Record
from models.evaluation.results import certified
from service.cli.evaluation.images import LabeledFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from models.purification.purifier import Purifier
    from models.runtime import Runtime
    from models.smoothing import SmoothedModel


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about every image; a local run's noise follows from `seed`."""

    n0: int
    n: int
    alpha: float
    method: str
    seed: int


@dataclass(frozen=True, slots=True)
class Purification:
    """How the baseline `purified` purifies, as `models.purification.purifier.Settings` has it.

    `auxiliary` is the folder of the network that guides it, None for none.
    """

    t_star: int | None
    draws: int
    guidance: float
    constraint: float
    auxiliary: Path | None


@dataclass(frozen=True, slots=True)
class Setting:
    """One run: `sigma` in [0,1] pixel units; None for the baselines without a certificate.

    The baseline `none` has noise and no denoiser. `undefended` is the classifier alone, and
    `purified` has images purified before it.
    """

    name: str
    stem: str
    sigma: float | None
    baseline: str | None = None


class Task(Protocol):
    """A task that can be evaluated."""

    @property
    def labels(self) -> Sequence[str]:
        """The labels, in the order of their indices."""

    @property
    def resolution(self) -> int:
        """The side of its images, in pixels."""

    @property
    def largest_sigma(self) -> float:
        """The strongest noise that the task supports, in [0,1] pixel units."""

    def settings(self, setting: Setting, question: Question) -> Mapping[str, Any]:
        """Everything that the records of this setting depend on but the images."""

    def records(
        self, files: Sequence[LabeledFile], setting: Setting, question: Question
    ) -> Iterator[Record]:
        """The record of each file, as it ends.

        Raises ValueError, naming the file, for one that is no usable image.
        """


class LocalTask:
    """A bundle whose networks run here; they are loaded for the first record."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        runtime: Runtime,
        models_dir: Any,
        purification: Purification | None = None,
    ) -> None:
        from models.smoothing import load, numerics

        self.name, self.bundle = name, bundle
        self.labels, self.resolution = bundle.labels, bundle.resolution
        self.largest_sigma = bundle.largest_sigma
        self.numerics = numerics(runtime)[0].described()
        self._load = partial(load, bundle, runtime=runtime, models_dir=models_dir)
        self._models_dir, self._purification = models_dir, purification

    @cached_property
    def model(self) -> SmoothedModel:
        """The networks; raises BundleError as `load` does."""
        return self._load()

    @cached_property
    def plain(self) -> SmoothedModel:
        """The classifier under noise, without the denoiser."""
        return without_denoiser(self.model)

    @cached_property
    def with_gradients(self) -> SmoothedModel:
        """The networks in float32 and eager torch, for attacks; raises BundleError as `load`."""
        import torch

        from models.runtime import Torch

        return self._load(runtime=Torch(), dtype=torch.float32, cpu_threads=0)

    @cached_property
    def purifier(self) -> Purifier:
        """The networks in float32 as a purifier; raises ValueError and BundleError for them."""
        from models.purification.loading import load_purifier
        from models.purification.purifier import Settings

        given = self._purification
        assert given is not None  # noqa: S101 - a plan with the baseline has it
        settings = Settings(given.t_star, given.guidance, given.constraint)
        return load_purifier(self.bundle, settings, given.auxiliary, models_dir=self._models_dir)

    def networks(self, setting: Setting) -> SmoothedModel:
        """The networks as they are served in this setting."""
        return self.plain if setting.baseline == "none" else self.model

    def plain_label(self, pixels: NDArray[np.uint8]) -> int:
        """The classifier's label index of the image alone, without noise and denoiser."""
        import torch

        x = torch.zeros(self.model.numerics.batch_rows, *pixels.shape, device=self.model.device)
        x[0] = torch.tensor(pixels) / 255
        with torch.inference_mode():
            return int(self.model.classifier(x)[0].argmax())

    def settings(self, setting: Setting, question: Question) -> Mapping[str, Any]:
        """As in `Task`."""
        return {
            "task": self.name,
            "baseline": setting.baseline,
            "bundle": self._digest(setting),
            "numerics": self.numerics,
            "k": self.bundle.k,
            "classes": len(self.labels),
            "resolution": self.resolution,
            **(self._described_purification(question) if setting.baseline == "purified" else {}),
            **({} if setting.sigma is None else {"sigma": setting.sigma, **asdict(question)}),
        }

    def records(
        self, files: Sequence[LabeledFile], setting: Setting, question: Question
    ) -> Iterator[Record]:
        """As in `Task`, one after another."""
        for file in files:
            pixels = file.pixels(self.resolution)
            if setting.sigma is None:
                yield self._uncertified(file, pixels, setting, question)
            else:
                yield self._smoothed(file, pixels, setting, question, setting.sigma)

    def _digest(self, setting: Setting) -> str:
        if setting.baseline in (None, "purified"):
            return self.bundle.served_digest(self.numerics)
        plain = replace(self.bundle, denoiser=Base("none"))
        return plain.served_digest(self.numerics)

    def _smoothed(
        self, file: LabeledFile, pixels: Any, setting: Setting, question: Question, sigma: float
    ) -> Record:
        from models.evaluation.tables import noise_key
        from models.noise import total_variation
        from models.rows import Rows
        from models.smoothing import votes

        model = self.networks(setting)
        began = time.perf_counter()
        selection, estimation = (
            nonzero(
                votes(
                    model,
                    Rows(pixels, noise_key(question.seed, file.index, domain), 0, rows, sigma),
                )
            )
            for domain, rows in (("selection", question.n0), ("estimation", question.n))
        )
        seconds = time.perf_counter() - began
        bare = Record(
            file.index, file.name, self.labels.index(file.label), -1, 0.0, estimation, selection,
            seconds, self._digest(setting),
        )  # fmt: skip
        blur = total_variation(sigma, pixels.shape)
        return certified(bare, len(self.labels), sigma, question.alpha, question.method, blur)

    def purified_label(self, pixels: NDArray[np.uint8], seed: int, index: int, rows: str) -> int:
        """The label index of most purifications of an image, under a key of these `rows` alone."""
        import torch

        from models.evaluation.tables import noise_key

        assert self._purification is not None  # noqa: S101 - a plan with the baseline has it
        key = noise_key(seed, index, f"purify {rows}")
        image = torch.tensor(pixels, device=self.model.device)
        labels = self.purifier.labels(image, key, 0, self._purification.draws)
        return int(np.bincount(labels, minlength=len(self.labels)).argmax())

    def _described_purification(self, question: Question) -> dict[str, Any]:
        assert self._purification is not None  # noqa: S101 - a plan with the baseline has it
        given = asdict(self._purification) | {"t_star": self.purifier.t_star}
        return {"purification": given | {"auxiliary": str(given["auxiliary"] or "")},
                "seed": question.seed}  # fmt: skip

    def _uncertified(
        self, file: LabeledFile, pixels: Any, setting: Setting, question: Question
    ) -> Record:
        """The label of the classifier alone, or of the purified image."""
        began = time.perf_counter()
        if setting.baseline == "purified":
            label = self.purified_label(pixels, question.seed, file.index, "clean")
        else:
            label = self.plain_label(pixels)
        return Record(
            file.index, file.name, self.labels.index(file.label), label, 0.0, {label: 1}, None,
            time.perf_counter() - began, self._digest(setting),
        )  # fmt: skip


def without_denoiser(model: SmoothedModel) -> SmoothedModel:
    """The model's classifier under noise alone (plain smoothing)."""
    from models.denoisers.base import NoDenoiser
    from models.smoothing import SmoothedModel

    return SmoothedModel(
        NoDenoiser(),
        model.classifier,
        model.numerics,
        model.device,
        cpu_threads=model.cpu_threads,
    )


def nonzero(counts: Any) -> dict[int, int]:
    """Votes (K,) by label index, without zeros."""
    return {int(label): int(counts[label]) for label in np.flatnonzero(counts)}
