"""The interface's description (OpenAPI): what FastAPI derives from the routes, made complete."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic_core import to_json

from service import errors
from service.api.open_inference.schemas import InferRequest, InputTensor
from service.api.open_inference.tensors import IMAGE
from service.api.problems import V2, problem_responses
from service.predictions.results import example

TAGS = {
    "predictions": "Questions about an image, and the tasks that answer them.",
    "jobs": "Questions in the queue: progress, result, cancellation.",
    "batches": "One question about many images, with one alpha for all.",
    "certificates": "Certificates of earlier answers, and the keys that verify them.",
    "demonstrations": "Pictures of what the networks see, and of an attack; they prove nothing.",
    "tasks": "New tasks from labels alone.",
    "open inference": "The Open Inference Protocol (v2), as Triton and KServe speak it.",
    "operation": "Probes and metrics.",
}
"""The groups of calls, in the order of /docs."""
HEADERS: dict[str, Any] = {
    "X-Request-Id": {
        "description": "The request's id, as sent or a new one; the log has it.",
        "schema": {"type": "string"},
    },
    "Location": {
        "description": "Where the job's state is.",
        "schema": {"type": "string", "format": "uri-reference"},
    },
    "Retry-After": {
        "description": "Seconds after which a retry may succeed, where one can.",
        "schema": {"type": "integer"},
    },
}
_VALIDATION_ERROR = "HTTPValidationError"
_REFERENCE = re.compile(r'"#/components/schemas/([^"]+)"')


def operation_id(route: APIRoute) -> str:
    """The name of a call for generated clients: the function's, told apart by protocol."""
    return f"v2_{route.name}" if route.path.startswith("/v2") else route.name


def described(app: FastAPI) -> dict[str, Any]:
    """The description with tags, security, the responses that all calls share, and examples.

    Examples are set here because FastAPI leaves their nulls out.
    """
    document = app.openapi()
    document["servers"] = [{"url": ".", "description": "The service that this came from."}]
    document["info"]["license"] = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    document["info"]["contact"] = {"name": "The maintainers of Vouchsafe"}
    document["tags"] = [{"name": name, "description": words} for name, words in TAGS.items()]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation.setdefault("security", [])
            is_invalid = _VALIDATION_ERROR in str(operation["responses"].get("422"))
            if is_invalid:
                del operation["responses"]["422"]  # FastAPI's own, which is never sent.
            for status, response in _shared(path, is_invalid).items():
                operation["responses"].setdefault(status, response)
            for status, response in operation["responses"].items():
                response["headers"] = _headers(status)
    _describe_infer(document)
    answer = example().model_dump(mode="json")
    for path, method, value in (
        ("/predict", "post", answer),
        ("/certificates/{id}", "get", answer["certificate"]),
    ):
        content = document["paths"][path][method]["responses"]["200"]["content"]
        content["application/json"]["example"] = value
    _remove_unused(document)
    return document


def _describe_infer(document: dict[str, Any]) -> None:
    """Add the bodies of infer, which its route reads by itself: JSON, or JSON and bytes."""
    schema = InferRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] |= schema.pop("$defs") | {InferRequest.__name__: schema}
    image = InputTensor(name=IMAGE, datatype="BYTES", shape=[1], data=["iVBORw0KGgo="])
    question = InferRequest(inputs=[image], parameters={"sigma": 0.25, "n": 1000})
    content = {
        "application/json": {
            "schema": {"$ref": f"#/components/schemas/{InferRequest.__name__}"},
            "example": question.model_dump(mode="json", exclude_unset=True),
        },
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    for path in document["paths"]:
        if path.endswith("/infer"):
            operation = document["paths"][path]["post"]
            operation["requestBody"] = {"required": True, "content": content}


def _shared(path: str, is_invalid: bool) -> dict[str, Any]:
    """The responses of any call: to other methods, to parameters that may be invalid, and below
    /v2 every error.
    """
    if not f"{path}/".startswith(V2):
        kinds = [errors.MethodNotAllowed, *([errors.InvalidField] if is_invalid else [])]
        return {str(status): found for status, found in problem_responses(*kinds).items()}
    schema = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string", "description": "What is wrong, and the limit."}},
    }
    content = {"application/json": {"schema": schema}}
    return {
        status: {"description": words, "content": content}
        for status, words in (("4XX", "The request cannot be answered"), ("5XX", "Not now"))
    }


def _headers(status: str) -> dict[str, Any]:
    """The headers of a response with this status."""
    named = ["X-Request-Id"]
    named += ["Location"] if status == "202" else []
    named += ["Retry-After"] if status in ("429", "503") else []
    return {name: HEADERS[name] for name in named}


def _remove_unused(document: dict[str, Any]) -> None:
    """Remove schemas that nothing refers to: enumerations whose values stand in place."""
    schemas = document["components"]["schemas"]
    while unused := schemas.keys() - set(_REFERENCE.findall(to_json(document).decode())):
        for name in unused:
            del schemas[name]
