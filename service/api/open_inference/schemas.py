"""Documents of the Open Inference Protocol over HTTP."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

MOST_PARAMETERS = 20
"""Of a request: every unknown one is named in the error."""


class ServerMetadata(BaseModel):
    """This server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor that a model takes or gives; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """A task as a model of the protocol."""

    name: str
    versions: list[str] = Field(description="Digests that live workers serve.")
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InputParameters(BaseModel):
    """Where an input's data is."""

    binary_data_size: int | None = Field(
        None, ge=0, strict=True, description="Bytes after the JSON; without it `data` has them."
    )


class OutputParameters(BaseModel):
    """Where an output's data goes."""

    binary_data: bool | None = Field(
        None, strict=True, description="After the JSON, not in it; else as the whole request."
    )


class InputTensor(BaseModel):
    """One input."""

    name: str
    shape: list[int]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: Any = None


class RequestedOutput(BaseModel):
    """One output that the caller wants."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferRequest(BaseModel):
    """A question about one image; `parameters` are fields of POST /predict."""

    id: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict, max_length=MOST_PARAMETERS)
    inputs: list[InputTensor] = Field(max_length=MOST_PARAMETERS)
    outputs: list[RequestedOutput] | None = Field(None, max_length=MOST_PARAMETERS)


class Live(BaseModel):
    """The server's health."""

    live: bool = True
