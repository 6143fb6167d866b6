"""Tensors of the Open Inference Protocol: an image from a request, an answer into a response.

They are JSON, or follow it as bytes (Triton's binary tensor extension).
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping
from io import BytesIO
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic_core import to_json
from starlette.responses import Response

from service import errors
from service.api.open_inference.schemas import InferRequest, InputTensor
from service.api.requests import validated
from service.errors import as_json
from service.predictions.schemas import PredictResponse
from service.validation import invalid_field

HEADER = "Inference-Header-Content-Length"
"""Bytes of the JSON at the body's begin, where binary tensors follow."""
IMAGE = "image"
BINARY_OUTPUT = "binary_data_output"
"""The parameter of a request that makes all its outputs binary."""
OUTPUTS: dict[str, str] = {
    "label": "BYTES",
    "label_index": "INT32",
    "certified": "BOOL",
    "abstained": "BOOL",
    "radius": "FP64",
    "p_lower": "FP64",
    "certificate": "BYTES",
}
"""Datatypes of the outputs, each of shape [1]."""
_DTYPES = {"INT32": "<i4", "BOOL": "?", "FP64": "<f8"}
_PREFIX_BYTES = 4
"""Of an element's length, before each element of a BYTES tensor."""


def parse(body: bytes, header_length: int | None) -> tuple[InferRequest, bytes]:
    """The request and its image as a file; raises InvalidField and MalformedRequest."""
    length = len(body) if header_length is None else header_length
    if length > len(body):
        raise errors.MalformedRequest(f"{HEADER} is {length}, and the body has {len(body)} bytes")
    asked = validated(lambda: InferRequest.model_validate_json(body[:length]), InferRequest)
    if [each.name for each in asked.inputs] != [IMAGE]:
        names = ", ".join(each.name for each in asked.inputs)
        raise invalid_field("inputs", f"inputs: they are {names or 'none'}; send one, {IMAGE}")
    (tensor,) = asked.inputs
    return asked, _image(tensor, body[length:])


def _invalid_image(detail: str, value: object = None) -> errors.InvalidField:
    return invalid_field(IMAGE, f"{IMAGE}: {detail}", value)


def _image(tensor: InputTensor, binary: bytes) -> bytes:
    size = tensor.parameters.binary_data_size
    if (size or 0) != len(binary):
        detail = f"binary_data_size is {size}, and {len(binary)} bytes follow the JSON"
        raise _invalid_image(detail)
    if tensor.datatype == "BYTES":
        if prod(tensor.shape) != 1:
            detail = f"shape is {tensor.shape}: send one image a request; POST /batches has more"
            raise _invalid_image(detail)
        return _unpacked(binary) if size else _decoded(tensor.data)
    if tensor.datatype == "UINT8":
        return _png(_pixels(tensor, binary if size else None))
    detail = f"datatype is {tensor.datatype}: send BYTES, an image's file, or UINT8, its pixels"
    raise _invalid_image(detail)


def _unpacked(binary: bytes) -> bytes:
    """The one element of a binary BYTES tensor."""
    length = int.from_bytes(binary[:_PREFIX_BYTES], "little")
    content = binary[_PREFIX_BYTES:]
    if length != len(content):
        detail = f"the element's length is {length}, and {len(content)} bytes follow it"
        raise _invalid_image(detail)
    return content


def _decoded(data: Any) -> bytes:
    """The one element of a BYTES tensor in JSON, in base64."""
    while isinstance(data, list) and len(data) == 1:
        (data,) = data
    try:
        return b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        detail = "data must be one image's file in base64, or binary"
        raise _invalid_image(detail) from error


def _pixels(tensor: InputTensor, binary: bytes | None) -> NDArray[np.uint8]:
    """The image (H,W,3) of a UINT8 tensor [H,W,3] or [3,H,W], also with a leading 1."""
    shape = tensor.shape[1:] if len(tensor.shape) == 4 and tensor.shape[0] == 1 else tensor.shape
    if len(shape) != 3 or 3 not in (shape[0], shape[-1]) or min(shape) < 1:
        detail = f"shape is {tensor.shape}: it must be [H, W, 3] or [3, H, W] of one image"
        raise _invalid_image(detail)
    if binary is not None:
        if len(binary) != prod(shape):
            detail = f"shape is {tensor.shape}, of {prod(shape)} bytes, and {len(binary)} came"
            raise _invalid_image(detail)
        values: NDArray[Any] = np.frombuffer(binary, np.uint8)
    else:
        values = _listed(tensor.data, prod(shape))
    pixels = values.reshape(shape)
    return pixels if shape[-1] == 3 else pixels.transpose(1, 2, 0)


def _listed(data: Any, count: int) -> NDArray[Any]:
    try:
        values = np.asarray(data)
    except ValueError as error:  # Lists of unequal lengths.
        raise _invalid_image("data must be whole numbers from 0 to 255") from error
    if values.dtype.kind not in "iu" or values.size != count:
        detail = f"data must be {count} whole numbers from 0 to 255"
        raise _invalid_image(detail)
    if values.min() < 0 or values.max() > 255:
        found = int(values.min() if values.min() < 0 else values.max())
        raise _invalid_image(f"data has {found}; the values must be from 0 to 255", found)
    return values.astype(np.uint8)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """The pixels as a PNG file, which is read as any other caller's."""
    with BytesIO() as file:
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
        return file.getvalue()


def wanted_outputs(asked: InferRequest) -> dict[str, bool]:
    """The outputs to return, all by default, and whether each is binary; raises InvalidField."""
    outputs, binary = asked.outputs, asked.parameters.get(BINARY_OUTPUT, False)
    if not isinstance(binary, bool):
        detail = f"parameters.{BINARY_OUTPUT}: it is {as_json(binary)}, and must be true or false"
        raise invalid_field(BINARY_OUTPUT, detail, binary)
    if not outputs:
        return dict.fromkeys(OUTPUTS, binary)
    if unknown := [each.name for each in outputs if each.name not in OUTPUTS]:
        detail = f"outputs: there is no {unknown[0]}; there are {', '.join(OUTPUTS)}"
        raise invalid_field("outputs", detail)
    chosen = {each.name: each.parameters.binary_data for each in outputs}
    return {name: binary if own is None else own for name, own in chosen.items()}


def response(id: str, answer: PredictResponse, wanted: Mapping[str, bool]) -> Response:
    """The answer's wanted outputs, as JSON or binary; 0 and "" stand for what it lacks."""
    certificate = answer.certificate
    values: dict[str, Any] = {
        "label": answer.label or "",
        "label_index": -1 if answer.label_index is None else answer.label_index,
        "certified": answer.certified,
        "abstained": answer.abstained,
        "radius": answer.radius or 0.0,
        "p_lower": answer.p_lower or 0.0,
        "certificate": certificate.document.id if certificate else "",
    }
    outputs, binaries = [], []
    for name, is_binary in wanted.items():
        output: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": [1]}
        if is_binary:
            binaries.append(_packed(values[name], OUTPUTS[name]))
            output["parameters"] = {"binary_data_size": len(binaries[-1])}
        else:
            output["data"] = [values[name]]
        outputs.append(output)
    document = {"model_name": answer.task, "model_version": answer.bundle, "outputs": outputs}
    if id:
        document["id"] = id
    header = to_json(document)
    if not binaries:
        return Response(header, media_type="application/json")
    return Response(
        header + b"".join(binaries),
        headers={HEADER: str(len(header))},
        media_type="application/octet-stream",
    )


def _packed(value: Any, datatype: str) -> bytes:
    if datatype == "BYTES":
        content: bytes = value.encode()
        return len(content).to_bytes(_PREFIX_BYTES, "little") + content
    return np.array([value], _DTYPES[datatype]).tobytes()
