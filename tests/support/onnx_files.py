"""ONNX files, written byte by byte: no package of this project writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.base_network import Base
from models.bundle import DEFAULT_TASK, read_bundle, write_bundle
from models.kinds import CLASSIFIER_FILES

FLOAT, INTS, INT = 1, 7, 2
"""Codes of ONNX: the element type of a tensor, and types of attributes."""


def network(classes: int) -> nn.Sequential:
    """A random network whose operators `save` writes: x (B,3,S,S) -> logits (B,classes)."""
    torch.manual_seed(6)
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(convolution, nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, classes)).eval()


def save(
    path: Path, built: nn.Sequential, side: int, batch: int | None = None, beside: str = ""
) -> None:
    """Write the network as ONNX, for batches of any size or of `batch` images.

    With `beside` it states that its weights lie in the file of that name, which is not written.
    """
    convolution, linear = built[0], built[4]
    nodes = [
        _node("Conv", ["x", "w", "b"], "c", _ints("strides", [2, 2]), _ints("pads", [1] * 4)),
        _node("Relu", ["c"], "r"),
        _node("GlobalAveragePool", ["r"], "p"),
        _node("Flatten", ["p"], "f"),
        _node("Gemm", ["f", "v", "d"], "logits", _int("transB", 1)),
    ]
    weights = [
        _tensor(name, tensor, beside)
        for name, tensor in (
            ("w", convolution.weight),
            ("b", convolution.bias),
            ("v", linear.weight),
            ("d", linear.bias),
        )
    ]
    graph = b"".join(_bytes(1, node) for node in nodes) + _text(2, "miniature")
    graph += b"".join(_bytes(5, weight) for weight in weights)
    graph += _bytes(11, _value("x", [batch, 3, side, side]))
    graph += _bytes(12, _value("logits", [batch, linear.out_features]))
    path.write_bytes(_number(1, 8) + _bytes(7, graph) + _bytes(8, _number(2, 17)))


def put_task(data: Path) -> None:
    """A task `own` of the default's labels in a data folder, whose classifier is an ONNX file."""
    default, head = read_bundle(DEFAULT_TASK), data / "models" / "head"
    head.mkdir(parents=True)
    save(head / "model.onnx", network(len(default.labels)), 32)
    described = {"size": 32, "mean": [0.5] * 3, "std": [0.2] * 3, "labels": default.labels}
    (head / "model.json").write_text(json.dumps(described))
    classifier = Base.of("onnx", str(head), CLASSIFIER_FILES["onnx"].required)
    own = replace(default, id="own", denoiser=Base("none"), classifier=classifier)
    write_bundle(data / "tasks" / "own", own, {})


def _node(kind: str, inputs: Sequence[str], output: str, *attributes: bytes) -> bytes:
    names = b"".join(_text(1, name) for name in inputs) + _text(2, output)
    return names + _text(4, kind) + b"".join(_bytes(5, each) for each in attributes)


def _ints(name: str, values: Sequence[int]) -> bytes:
    return _text(1, name) + b"".join(_number(8, value) for value in values) + _number(20, INTS)


def _int(name: str, value: int) -> bytes:
    return _text(1, name) + _number(3, value) + _number(20, INT)


def _tensor(name: str, tensor: Tensor, beside: str) -> bytes:
    dims = b"".join(_number(1, size) for size in tensor.shape)
    if beside:
        place = _bytes(13, _text(1, "location") + _text(2, beside)) + _number(14, 1)
        return dims + _number(2, FLOAT) + _text(8, name) + place
    raw = tensor.detach().numpy().astype("<f4").tobytes()
    return dims + _number(2, FLOAT) + _text(8, name) + _bytes(9, raw)


def _value(name: str, shape: Sequence[int | None]) -> bytes:
    dims = (_text(2, "batch") if size is None else _number(1, size) for size in shape)
    tensor = _number(1, FLOAT) + _bytes(2, b"".join(_bytes(1, dim) for dim in dims))
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())
