"""The interface's description: what redocly's and spectral's recommended rules ask for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from service.api.client_types import PATH, module
from service.api.description import TAGS
from service.api.open_inference.schemas import InferRequest
from tests.support.paths import ROOT
from tests.support.serving import serving


@pytest.fixture
async def document() -> Any:
    async with serving() as service:
        return (await service.client.get("/openapi.json")).json()


def operations(document: Any) -> dict[str, Any]:
    return {
        f"{method} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


async def test_calls_are_named_and_grouped(document: Any) -> None:
    """Each has a name of its own, a summary, a description, and tags that are described."""
    calls = operations(document)
    names = [each["operationId"] for each in calls.values()]
    assert len(names) == len(set(names))
    assert {"predict", "get_job", "v2_infer"} <= set(names)
    described = [tag["name"] for tag in document["tags"]]
    assert described == list(TAGS)
    used = [tag for each in calls.values() for tag in each["tags"]]
    assert set(used) == set(described)
    assert not [call for call, each in calls.items() if not each["description"]]
    assert not [call for call, each in calls.items() if not each["summary"]]


async def test_calls_say_how_they_are_refused(document: Any) -> None:
    """Every call has its security, a 4xx response, and the headers of each response."""
    for call, each in operations(document).items():
        assert "security" in each, call
        assert any(status.startswith("4") for status in each["responses"]), call
        for status, response in each["responses"].items():
            assert "X-Request-Id" in response["headers"], call
            assert ("Retry-After" in response["headers"]) is (status in ("429", "503")), call
    predict = document["paths"]["/predict"]["post"]["responses"]
    assert "Location" in predict["202"]["headers"]
    for path in ("/v2/models/{task}/infer", "/v2"):
        method = "post" if path.endswith("infer") else "get"
        refused = document["paths"][path][method]["responses"]["4XX"]["content"]
        assert list(refused["application/json"]["schema"]["properties"]) == ["error"]


async def test_the_document_is_whole(document: Any) -> None:
    """It has a server, a license and a contact, and no schema that nothing refers to."""
    assert document["servers"]
    assert {"license", "contact", "description"} <= set(document["info"])
    text = json.dumps(document)
    assert set(document["components"]["schemas"]) <= set(re.findall(r"schemas/([^\"]+)", text))
    assert "HTTPValidationError" not in text


def test_the_clients_types_are_current(document: Any) -> None:
    """service/client/types.py is what `make client` writes."""
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(PATH), "-"]
    made = subprocess.run(  # noqa: S603
        ruff, input=module(document), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert PATH.read_text() == made.stdout, "run `make client`"


async def test_responses_have_the_request_id() -> None:
    """Of every kind: an answer, a problem, an error of the Open Inference Protocol, a probe."""
    async with serving() as service:
        for path in ("/models", "/jobs/x", "/v2/models/pets", "/livez", "/v2/health/live"):
            response = await service.client.get(path, headers={"X-Request-Id": "mine"})
            assert response.headers["x-request-id"] == "mine", path


async def test_infer_and_problems_are_described(document: Any) -> None:
    """Infer has both bodies, with an example that its model reads; a problem has its fields."""
    schemas = document["components"]["schemas"]
    for path in ("/v2/models/{task}/infer", "/v2/models/{task}/versions/{version}/infer"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "application/octet-stream"}
        assert content["application/json"]["schema"]["$ref"].rpartition("/")[2] in schemas
        assert InferRequest.model_validate(content["application/json"]["example"]).inputs
    refused = document["paths"]["/predict"]["post"]["responses"]["422"]["content"]
    properties = refused["application/problem+json"]["schema"]["properties"]
    assert {"type", "title", "status", "detail", "limit", "errors"} == set(properties)
