"""The loss of a smoothed, purified or undefended classifier as a function of one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.classifiers.base import Classifier
from models.kinds import NoGradients
from models.noise import discrete_gaussian
from models.purification.keyed import Row, keyed_noise
from models.purification.purifier import Purifier
from models.smoothing import SmoothedModel

Noise = Callable[[int], Tensor]
"""Step of an attack -> its rows (m,...): noise (m,3,H,W) in [0,1] units, or numbers of draws (m,).
"""
Logits = Callable[[Tensor, Tensor], Tensor]
"""An image x (3,H,W) in [0,1], rows (m,...) -> logits (m,K)."""


class Pipeline:
    """What classifies an image, as a differentiable function: the mean over rows of `logits`.

    On a smoothed classifier its loss is that of SmoothAdv (Salman et al. 2019, arXiv 1906.04584).
    `batch_rows` rows have their activations in memory together. The networks should be float32,
    since gradients in bfloat16 are coarse.
    """

    def __init__(self, logits: Logits, noise: Noise, batch_rows: int) -> None:
        self.logits, self._noise, self._batch_rows = logits, noise, batch_rows

    def loss(self, x: Tensor, label: int, step: int = 0) -> float:
        """-log of the mean probability of `label` over the rows of `step`, at x (3,H,W).

        Raises FloatingPointError where it is not finite.
        """
        with torch.no_grad():
            logs = torch.stack([*self._log_sums(x, label, step)])
        return self._loss(logs)

    def gradient(self, x: Tensor, label: int, step: int = 0) -> tuple[float, Tensor]:
        """The loss and its gradient by x (3,H,W), through classifier and denoiser.

        The log of a sum has the gradient of its parts' logs, weighted by their shares of the sum.
        So rows are summed batch after batch, and the gradient is that of all rows at once. Raises
        NoGradients for networks without gradients, FloatingPointError as `loss`.
        """
        at = x.detach().requires_grad_()
        logs, gradients = [], []
        for log_sum in self._log_sums(at, label, step):
            if not log_sum.requires_grad:
                raise NoGradients(
                    "the networks give no gradients: only --attack random is possible"
                )
            gradients.append(torch.autograd.grad(log_sum, at)[0])
            logs.append(log_sum.detach())
        stacked = torch.stack(logs)
        shares = stacked.softmax(0).to(x.dtype)[:, None, None, None]
        return self._loss(stacked), -(shares * torch.stack(gradients)).sum(0)

    def _log_sums(self, x: Tensor, label: int, step: int) -> Iterator[Tensor]:
        """log of the mean over all rows of `label`'s probability, the part of each batch."""
        rows = self._noise(step)
        for noise in rows.split(self._batch_rows):
            logs = _log_probability(self.logits(x, noise), label)
            yield logs.logsumexp(0) - math.log(len(rows))

    def _loss(self, logs: Tensor) -> float:
        loss = -float(logs.logsumexp(0))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the attack's loss is {loss}: logits are not finite")
        return loss


def _log_probability(logits: Tensor, label: int) -> Tensor:
    """log of the label's probability (B,), from logits (B,K), in float64.

    By the odds of the other labels: as 1 - p, they would be 0 next to 1, and so the gradient.
    """
    exact = logits.double()
    others = torch.cat([exact[:, :label], exact[:, label + 1 :]], 1)
    return -F.softplus(others.logsumexp(1) - exact[:, label], threshold=40)


def undefended(classifier: Classifier, shape: tuple[int, ...], device: torch.device) -> Pipeline:
    """The classifier of images of `shape` alone: one row without noise; the loss is its own."""
    still = torch.zeros(1, *shape, device=device)
    return Pipeline(lambda x, noise: classifier(x + noise), lambda step: still, 1)


def smoothed(
    model: SmoothedModel,
    sigma: float,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    key: bytes,
    rows: int,
    batch_rows: int,
    fresh: bool = False,
) -> Pipeline:
    """The smoothed classifier under `rows` noise rows of a key (32 bytes) that only attacks use.

    With `fresh`, every step has other rows (expectation over transformation, Athalye et al. 2018).
    Otherwise every step has the same.

    The service adds noise of the 1/255 grid to an image of that grid, and the noise's law does not
    depend on the image (models/noise.py). So the drawn rows are constants: as a function of a
    continuous x, a row is x + noise, whose derivative by x is the identity. At images of the grid
    this function has the values of the service, and its gradient is that of the continuous
    pipeline, without any estimate.
    """

    def drawn(step: int) -> Tensor:
        start = step * rows
        return discrete_gaussian(key, start, start + rows, shape, sigma, device) / 255

    def logits(x: Tensor, noise: Tensor) -> Tensor:
        sigmas = torch.full((len(noise),), sigma, dtype=torch.float64)
        return model.classifier(model.denoiser(x + noise.to(x.dtype), sigmas))

    fixed = None if fresh else drawn(0)
    noise: Noise = drawn if fixed is None else lambda step: fixed
    return Pipeline(logits, noise, batch_rows)


def purified(
    purifier: Purifier, *, key: bytes, rows: int, batch_rows: int, fresh: bool = False
) -> Pipeline:
    """Purified images before the classifier, a purification a row, keyed as in `smoothed`.

    The gradient passes through every step of the reverse process.
    """

    def logits(x: Tensor, draws: Tensor) -> Tensor:
        own = [Row(0, draw) for draw in draws.tolist()]
        noise = keyed_noise(key, own, tuple(x.shape), x.device)
        return purifier.logits(x.expand(len(own), *x.shape), noise)

    def drawn(step: int) -> Tensor:
        start = step * rows if fresh else 0
        return torch.arange(start, start + rows)

    return Pipeline(logits, drawn, batch_rows)
