"""A task of a running service as a classifier of IBM's Adversarial Robustness Toolbox.

ART's black-box attacks take it; `certify` is that of ART's own randomized smoothing. Needs
`adversarial-robustness-toolbox` and Pillow.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from art.estimators.classification import ClassifierMixin
from art.estimators.estimator import BaseEstimator
from PIL import Image
from vouchsafe import Client


class CertifiedClassifier(ClassifierMixin, BaseEstimator):
    """A task, for x (N,3,R,R) in [0,1] at its resolution; `question` as in `Client.predict`."""

    def __init__(self, client: Client, task: str = "default", **question: Any) -> None:
        super().__init__(model=client, clip_values=(0.0, 1.0))
        tasks = {each["task"]: each for each in client.models()}
        if task not in tasks:
            raise ValueError(f"task = {task!r}: must be one of {', '.join(tasks)}")
        self.nb_classes, side = len(tasks[task]["labels"]), tasks[task]["resolution"]
        self._input_shape, self._question = (3, side, side), {"task": task, **question}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(3,R,R)."""
        return self._input_shape

    def fit(self, x: Any, y: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: a task is made from labels by `POST /tasks`."""
        raise NotImplementedError("a service's task is not fitted to pictures")

    def predict(self, x: np.ndarray, batch_size: int = 128, **kwargs: Any) -> np.ndarray:
        """One-hot labels (N,K), zeros on abstention; pixels are rounded to the grid of 1/255."""
        answers = [self._answer(image, mode="predict") for image in x]
        chosen = np.array([-1 if each["abstained"] else each["label_index"] for each in answers])
        return (chosen[:, None] == np.arange(self.nb_classes)).astype(float)

    def certify(self, x: np.ndarray, n: int, batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """Labels (N,), -1 on abstention, and l2 radii (N,), of pictures on the grid of 1/255."""
        if np.abs(x * 255 - np.rint(x.clip(0, 1) * 255)).max(initial=0) > 1e-3:
            raise ValueError("x is not on the grid of 1/255, on which the radius would hold")
        answers = [self._answer(image, n=n) for image in x]
        labels = [-1 if each["abstained"] else each["label_index"] for each in answers]
        return np.array(labels, int), np.array([each["radius"] for each in answers], float)

    def _answer(self, image: np.ndarray, **mode: Any) -> dict[str, Any]:
        if image.shape != self.input_shape:
            raise ValueError(f"x has pictures of shape {image.shape}: must be {self.input_shape}")
        pixels = np.rint(image.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(content := BytesIO(), "PNG")
        return self.model.predict(content.getvalue(), **{**self._question, **mode})
