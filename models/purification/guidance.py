"""Adversarial guidance: how an auxiliary network moves a reverse step (arXiv 2403.16067)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor], Tensor]
"""x_t (B,3,H,W) in [-1,1] units, never clipped -> logits (B,K)."""


class Guidance:
    """g_t = grad log p(y | x_t) - D(h(x_t), h(x')) of one batch of input images x' (B,3,H,W).

    h are the network's logits, p their softmax, D the mean square difference of logits, and y the
    network's label of x'. x' is in [-1,1] units; gradients by it pass through h(x').
    """

    def __init__(self, network: Network, given: Tensor) -> None:
        self._network = network
        self._reference = network(given)
        self._labels = self._reference.argmax(1)

    def objective(self, x_t: Tensor) -> Tensor:
        """log p(y | x_t) - D(h(x_t), h(x')) by row (B,)."""
        logits = self._network(x_t)
        log_probability = -F.cross_entropy(logits, self._labels, reduction="none")
        distance: Tensor = (logits - self._reference).square().mean(1)
        return log_probability - distance

    def gradient(self, x_t: Tensor, longest: Tensor) -> Tensor:
        """g_t (B,3,H,W), shortened row by row to at most `longest` (B,), its l2 norm.

        It can itself be differentiated where x_t requires a gradient.
        """
        differentiable = torch.is_grad_enabled() and x_t.requires_grad
        with torch.enable_grad():
            at = x_t if differentiable else x_t.detach().requires_grad_()
            total = self.objective(at).sum()
            (found,) = torch.autograd.grad(total, at, create_graph=differentiable)
        return shortened(found, longest)


def shortened(gradient: Tensor, longest: Tensor) -> Tensor:
    """Rows (B,3,H,W) of l2 norm at most `longest` (B,), each in its direction."""
    length = gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
    share: Tensor = (longest / length).clamp(max=1)
    return gradient * share[:, None, None, None]
