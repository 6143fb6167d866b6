"""Similarity of images to concepts, words of any kind, behind a task's CLIP head (paper, C.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bundle import Base, Bundle
from models.classifiers.base import ZeroShot
from models.classifiers.registry import DESCRIPTIONS, PROMPT_TOKENS
from models.denoisers.base import Denoiser
from models.noise import discrete_gaussian
from models.runtime import Torch
from models.smoothing import load

BATCH_ROWS = 8


@dataclass(frozen=True, slots=True)
class Reading:
    """One image's similarity to C concepts: `cosines` (C,) and `shares` (C,).

    A cosine, from -1 to 1, is that of the embeddings of image and prompt. The shares are the
    softmax of the head's logits, which are cosines at the head's scale; they add up to 1.
    """

    cosines: NDArray[np.float64]
    shares: NDArray[np.float64]


class ConceptHead:
    """A task's classifier in float32, with `concepts` in the place of its labels.

    `prompts` are the words in the template of those concepts that have others than their own.
    Raises ValueError for a classifier that does not take words, fewer than two concepts, and a
    prompt that the text tower would cut; BundleError as `models.smoothing.load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        concepts: Sequence[str],
        prompts: Mapping[str, str],
        models_dir: Path | None = None,
    ) -> None:
        if len(concepts) < 2:
            raise ValueError(f"concepts: there are {len(concepts)}; the fewest are 2")
        words = replace(bundle, labels=tuple(concepts), prompts=prompts, denoiser=Base("none"))
        _check_words(words, models_dir)
        loaded = load(
            words, dtype=torch.float32, cpu_threads=0, runtime=Torch(), models_dir=models_dir
        )
        self.concepts = words.labels
        self._device = loaded.device
        self._classifier = cast(ZeroShot, loaded.classifier)
        self.scale = self._classifier.scale

    @torch.inference_mode()
    def undefended(self, pixels: NDArray[np.uint8]) -> Reading:
        """The reading of an image (3,R,R) by the classifier alone."""
        return self._mean([torch.tensor(pixels, device=self._device)[None] / 255])

    @torch.inference_mode()
    def defended(
        self, pixels: NDArray[np.uint8], denoiser: Denoiser, sigma: float, rows: int, key: bytes
    ) -> Reading:
        """The mean reading of an image's denoised noisy rows, those of a key (32 bytes)."""
        x = torch.tensor(pixels, device=self._device) / 255
        denoised = []
        for start in range(0, rows, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, rows)
            noise = discrete_gaussian(key, start, stop, pixels.shape, sigma, x.device) / 255
            sigmas = torch.full((stop - start,), sigma, dtype=torch.float64)
            denoised.append(denoiser(x + noise.to(x.dtype), sigmas))
        return self._mean(denoised)

    def _mean(self, batches: Sequence[Tensor]) -> Reading:
        logits = torch.cat([self._classifier(batch) for batch in batches]).double()
        cosines = (logits - self._classifier.bias) / self.scale
        means = (each.mean(0).cpu().numpy() for each in (cosines, logits.softmax(1)))
        return Reading(*means)


def _check_words(words: Bundle, models_dir: Path | None) -> None:
    """Raises ValueError unless the classifier reads each of the bundle's words whole."""
    kind = words.classifier.kind
    with words.classifier.opened(models_dir) as folder:
        if kind not in DESCRIPTIONS or not DESCRIPTIONS[kind](folder).takes_words:
            raise ValueError(
                f"task {words.id}: its classifier of kind {kind} has fixed labels; concepts need "
                "a CLIP or SigLIP"
            )
        prompts = [words.template.format(word) for word in words.words]
        counts, most = PROMPT_TOKENS[kind](folder, prompts)
    for prompt, count in zip(prompts, counts, strict=True):
        if count > most:
            raise ValueError(f"concepts: the prompt {prompt!r} has {count} tokens; at most {most}")


def ranked(shares: NDArray[np.float64], count: int) -> list[int]:
    """The indices of the `count` largest shares, descending."""
    return [int(index) for index in np.argsort(-shares, kind="stable")[:count]]
