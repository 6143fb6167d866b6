"""Evaluation by the protocol of method.md section 6: certificates of labeled images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.certificates.rules import Certificate, certify
from models.classifiers.base import Classifier
from models.evaluation.datasets.cifar10 import LabelledImages
from models.evaluation.scores import EPSILONS, average_certified_radius, certified_accuracy
from models.noise import total_variation
from models.rows import Rows
from models.smoothing import SmoothedModel, votes


@dataclass(frozen=True, slots=True)
class Certified:
    """One image's outcome: `row_accuracy` is the share of estimation rows with the true label.

    `certificate` is by Cohen's rule, as in published tables, and `two_sided` is from the same votes
    with the runner-up bounded.
    """

    index: int
    truth: int
    certificate: Certificate
    two_sided: Certificate
    row_accuracy: float

    @property
    def radius(self) -> float:
        """Certified l2 radius in [0,1] pixel units; 0.0 for an abstention."""
        return self.certificate.radius or 0.0

    @property
    def correct(self) -> bool:
        """Whether the certified label is the true one; an abstention is not."""
        return self.certificate.label == self.truth and not self.certificate.abstained


@dataclass(frozen=True, slots=True)
class Summary:
    """Fractions over a data set: single noisy rows, certified accuracy by radius, ACR.

    The latter two by Cohen's rule, as in published tables, and by the two-sided one.
    """

    images: int
    row_accuracy: float
    certified: dict[float, float]
    average_certified_radius: float
    certified_two_sided: dict[float, float]
    average_certified_radius_two_sided: float


def accuracy(
    classifier: Classifier, data: LabelledImages, device: torch.device, batch_rows: int
) -> float:
    """Share of clean images that the undefended head classifies correctly.

    Batches have one shape, as in serving.
    """
    right = 0
    with torch.inference_mode():
        for start in range(0, len(data), batch_rows):
            part = data[start : start + batch_rows]
            x = torch.zeros(batch_rows, *data.images.shape[1:], device=device)
            x[: len(part)] = torch.tensor(part.images, device=device) / 255
            named = classifier(x.permute(0, 3, 1, 2)).argmax(1)[: len(part)].cpu().numpy()
            right += int((named == part.labels).sum())
    return right / len(data)


def certify_images(
    model: SmoothedModel,
    data: LabelledImages,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    seed: int,
) -> Iterator[Certified]:
    """The outcomes of CERTIFY for the images, in order.

    Noise keys follow from `seed` and the image's index, so a run is reproducible to the row.
    """
    for index in range(len(data)):
        selection, estimation = image_votes(model, data, index, sigma, n0, n, seed)
        yield outcome(data, index, selection, estimation, sigma, alpha)


def image_votes(
    model: SmoothedModel,
    data: LabelledImages,
    index: int,
    sigma: float,
    n0: int,
    n: int,
    seed: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One image's selection and estimation votes (K,); noise follows from `seed` and `index`."""
    pixels = np.ascontiguousarray(data.images[index].transpose(2, 0, 1))
    selection, estimation = (
        votes(model, Rows(pixels, noise_key(seed, index, domain), 0, rows, sigma))
        for domain, rows in (("selection", n0), ("estimation", n))
    )
    return selection, estimation


def noise_key(seed: int, index: int, domain: str) -> bytes:
    """The key of an image's noise; no two uses of it share a `domain`, as "selection" has one."""
    return hashlib.sha256(f"evaluation/{seed}/{index}/{domain}".encode()).digest()


def outcome(
    data: LabelledImages,
    index: int,
    selection: NDArray[np.int64],
    estimation: NDArray[np.int64],
    sigma: float,
    alpha: float,
) -> Certified:
    """The outcome of an image's votes (K,)."""
    height, width, channels = data.images[index].shape
    truth = int(data.labels[index])
    cohen, two_sided = (
        certify(
            selection.tolist(),
            estimation.tolist(),
            sigma,
            alpha,
            method=method,
            total_variation=total_variation(sigma, (channels, height, width)),
        )
        for method in ("cohen", "two-sided")
    )
    return Certified(index, truth, cohen, two_sided, float(estimation[truth] / estimation.sum()))


def summarise(outcomes: list[Certified]) -> Summary:
    """The figures of a run; needs at least one outcome."""
    truths = np.array([outcome.truth for outcome in outcomes])
    cohen, average_cohen = _figures([outcome.certificate for outcome in outcomes], truths)
    two_sided, average_two_sided = _figures([outcome.two_sided for outcome in outcomes], truths)
    return Summary(
        images=len(outcomes),
        row_accuracy=float(np.mean([outcome.row_accuracy for outcome in outcomes])),
        certified=cohen,
        average_certified_radius=average_cohen,
        certified_two_sided=two_sided,
        average_certified_radius_two_sided=average_two_sided,
    )


def _figures(
    certificates: list[Certificate], truths: NDArray[np.int64]
) -> tuple[dict[float, float], float]:
    """Certified accuracy by radius and the average certified radius, for labels (N,)."""
    radii = [certificate.radius or 0.0 for certificate in certificates]
    correct = [c.label == truth for c, truth in zip(certificates, truths, strict=True)]
    certified = {epsilon: certified_accuracy(radii, correct, epsilon) for epsilon in EPSILONS}
    return certified, average_certified_radius(radii, correct)


def recognised(
    classifier: Classifier,
    generate: Callable[[int], NDArray[np.uint8]],
    device: torch.device,
    each: int,
    batch_rows: int,
) -> float:
    """Share of generated images, `each` per label, that the head classifies as that label.

    `generate` maps a label's index to images (each,H,W,3) uint8.
    """
    right = 0
    for label in range(len(classifier.labels)):
        images = generate(label)
        truth = np.full(len(images), label, np.int64)
        data = LabelledImages(images, truth, classifier.labels)
        right += round(accuracy(classifier, data, device, batch_rows) * len(images))
    return right / (each * len(classifier.labels))
