"""ONNX files run by onnxruntime in float32, with what they need in a JSON file beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.classifiers.base import Classifier, Description, Preprocess, check_count
from models.runtime import Runtime, RuntimeUnavailable

NETWORK, DESCRIPTION = "model.onnx", "model.json"
_FIELDS = {"size", "mean", "std", "labels", "interpolation"}


class OnnxClassifier:
    """An ONNX file: its first input is images (B,3,S,S), its first output logits (B,K).

    A session has one thread, so that a row's logits are the same whatever else the machine does.
    """

    def __init__(self, session: Any, labels: Sequence[str], preprocess: Preprocess) -> None:
        self.labels = tuple(labels)
        self._session = session
        self._input = session.get_inputs()[0].name
        self._output = session.get_outputs()[0].name
        self._preprocess = preprocess
        self._is_single = session.get_inputs()[0].shape[0] == 1

    def __call__(self, x: Tensor) -> Tensor:
        """See `Classifier`."""
        images = self._preprocess(x).contiguous().cpu().numpy()
        batches = np.split(images, len(images)) if self._is_single else [images]
        logits = np.concatenate([self._run(batch) for batch in batches])
        return torch.from_numpy(logits).to(x.device)

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = self._session.run([self._output], {self._input: images})[0]
        return output


def describe_onnx(folder: Path) -> Description:
    """The input's side and the labels that `model.json` states."""
    described = _described(folder)
    labels = described.get("labels")
    return Description(described["size"], None if labels is None else tuple(labels))


def _described(folder: Path) -> dict[str, Any]:
    """The content of `model.json`: size, mean and std, and perhaps labels and interpolation.

    Raises ValueError that names the field.
    """
    path = folder / DESCRIPTION
    described: dict[str, Any] = json.loads(path.read_text())
    if not isinstance(described, dict):
        raise ValueError(f"{path}: holds no JSON object with the fields {sorted(_FIELDS)}")
    if odd := sorted(described.keys() - _FIELDS):
        raise ValueError(f"{path}: unknown fields {odd}; known are {sorted(_FIELDS)}")
    size = described.get("size")
    if not isinstance(size, int) or not 1 <= size <= 4096:
        raise ValueError(f"{path}: size is {size!r}; it must be 1 to 4096 pixels")
    for name in ("mean", "std"):
        value = described.get(name)
        given = value if isinstance(value, list) else []
        numbers = [each for each in given if isinstance(each, int | float)]
        if len(numbers) != 3 or len(given) != 3 or (name == "std" and min(numbers) <= 0):
            raise ValueError(f"{path}: {name} is {value!r}; it must be 3 numbers, in [0,1] units")
    labels = described.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: labels is {str(labels)[:80]!r}; it must be a list of strings")
    mode = described.setdefault("interpolation", "bicubic")
    if mode not in ("bicubic", "bilinear"):
        raise ValueError(f"{path}: interpolation is {mode!r}; it must be bicubic or bilinear")
    return described


def load_onnx(
    folder: Path,
    labels: Sequence[str],
    template: str,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    tuned: Path | None = None,
) -> Classifier:
    """A classifier from `model.onnx` and `model.json`; `template` and `dtype` do not matter.

    On a GPU the session runs there. Raises RuntimeUnavailable without onnxruntime, or without its
    support of the GPU, and ValueError for a file of other inputs or outputs.
    """
    described = _described(folder)
    session = _session(folder / NETWORK, device)
    given, size = session.get_inputs(), described["size"]
    free = [side if isinstance(side, int) else None for side in given[0].shape]
    fits = len(free) == 4 and all(
        side in (None, wanted) for side, wanted in zip(free[1:], (3, size, size), strict=True)
    )
    if len(given) != 1 or given[0].type != "tensor(float)" or not fits or free[0] not in (None, 1):
        raise ValueError(
            f"{folder / NETWORK}: takes {[(each.type, each.shape) for each in given]}; it must "
            f"take float32 images (B,3,{size},{size}) alone, with B free or 1"
        )
    preprocess = Preprocess(
        size,
        described["mean"],
        described["std"],
        torch.empty(0, device=device),
        described["interpolation"],
    )
    classifier = OnnxClassifier(session, labels, preprocess)
    logits = classifier(torch.zeros(1, 3, size, size, device=device))
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"{folder / NETWORK}: gives {tuple(logits.shape)} {logits.dtype}")
    check_count(folder, logits.shape[1], labels)
    return classifier


def _session(path: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise RuntimeUnavailable(
            "a classifier of kind onnx needs onnxruntime: pip install onnxruntime"
        ) from error
    wanted = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise RuntimeUnavailable(
            f"this onnxruntime has no {wanted}: pip install onnxruntime-gpu, or hide the GPU"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=[wanted])
    except Exception as error:  # onnxruntime raises its own classes, with no common one.
        advice = "; its weights must be in the file itself" if "xternal data" in str(error) else ""
        raise ValueError(f"{path}: onnxruntime cannot load it: {error}{advice}") from error
    if session.get_providers()[0] != wanted:
        raise RuntimeUnavailable(f"onnxruntime cannot use {wanted} on this machine")
    return session
