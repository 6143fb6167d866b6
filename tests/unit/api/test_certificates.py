"""POST /certificates/verify: the service's checks of a certificate."""

from __future__ import annotations

import json
from typing import Any

from service.predictions.verification import MOST_BYTES
from tests.support.paths import ROOT
from tests.support.serving import Service, problem, serving

EXAMPLE = ROOT / "docs" / "examples" / "certificate.json"
"""Signed by the keys of another service."""


async def verified(service: Service, text: str) -> Any:
    """The response to a certificate's text."""
    response = await service.client.post("/certificates/verify", content=text)
    assert response.status_code == 200
    return response.json()


async def test_a_certificate_of_the_service_passes() -> None:
    """Its own certificate passes each check; the document is what was signed."""
    async with serving() as service:
        certificate = (await service.ask()).json()["certificate"]
        found = await verified(service, json.dumps(certificate))
    assert found["passed"]
    assert found["document"] == certificate["document"]
    checks = {check["name"]: check["passed"] for check in found["checks"]}
    expected = ("format", "document", "signature", "statistics", "model", "commitment")
    assert checks == dict.fromkeys(expected, True)


async def test_another_certificate_fails() -> None:
    """A changed document, an unreadable one and other keys fail by name, never with an error."""
    async with serving() as service:
        certificate = (await service.ask()).json()["certificate"]
        certificate["document"]["result"]["radius"] = 9.0
        changed = await verified(service, json.dumps(certificate))
        unreadable = await verified(service, "[" * 1000)
        foreign = await verified(service, EXAMPLE.read_text())
    failed = [
        [check["name"] for check in found["checks"] if check["passed"] is False]
        for found in (changed, unreadable, foreign)
    ]
    assert failed[0] == ["document"]
    assert failed[1] == ["format"]
    assert "signature" in failed[2]
    assert (unreadable["document"], unreadable["passed"]) == (None, False)


async def test_a_long_text_is_refused() -> None:
    """More bytes than a certificate can have are a 413 with the limit."""
    async with serving() as service:
        response = await service.client.post("/certificates/verify", content=" " * (MOST_BYTES + 1))
    problem(response, 413, "too-large")
    assert response.json()["limit"] == MOST_BYTES
