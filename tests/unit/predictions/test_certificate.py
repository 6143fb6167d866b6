"""Certificates over HTTP and in the process: what they hold, and where they are found."""

from __future__ import annotations

import asyncio
import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from models.certificates.evidence import recompute
from models.certificates.norms import attack_norms
from service.jobs import Mode, State
from service.predictions.certificate import Issuing
from service.predictions.results import certificate
from service.predictions.verification import Verifier
from service.signing import SigningKeys, canonical, signed_payload
from tests.support.certificates import BUNDLE, asked, ended, issued
from tests.support.http import ANN, BOB, events
from tests.support.serving import KEYS, PNG, SECRET, Service, problem, serving, split

TWO = {"api_keys": "ann:key-of-ann,bob:key-of-bob"}


def test_the_payload_is_the_canonical_document() -> None:
    """The JWS signs the document's RFC 8785 bytes, and nothing else."""
    signed = issued()
    _, payload = signed_payload(signed["jws"])
    assert payload == canonical(signed["document"])


def test_the_result_follows_from_question_and_evidence() -> None:
    """What the answer proves is what a checker recomputes."""
    document = issued()["document"]
    found = recompute(document["question"], document["evidence"], len(BUNDLE.labels))
    proven = certificate(ended())
    assert found == proven
    assert document["result"]["radius"] == proven.radius
    assert document["result"]["label"] == "cat"
    assert document["result"]["norms"] == attack_norms(document["result"]["radius"], (3, 8, 8))


def test_the_document_names_image_model_and_time() -> None:
    """Hashes of array and file, the bundle's parts, and the job's end in UTC."""
    document = issued()["document"]
    assert document["subject"]["file_sha256"] == hashlib.sha256(PNG).hexdigest()
    assert document["model"]["task_digest"] == BUNDLE.digest
    assert document["model"]["labels"] == list(BUNDLE.labels)
    told = datetime.fromisoformat(document["service"]["issued_at"])
    assert told.timestamp() == 1.8e9


def test_the_same_job_has_the_same_bytes() -> None:
    """Every rendering of one job is the same certificate, signature included."""
    assert json.dumps(issued()) == json.dumps(issued())


def test_a_certificate_holds_no_secret() -> None:
    """Neither the image nor its key, the noise secret, the signing key or the caller's name."""
    text = json.dumps(issued(ended(asked(owner="ada-of-the-lovelaces"))))
    job = asked()
    for secret in (job.pixels, PNG, job.key, SECRET, b"k" * 32):
        assert secret.hex() not in text
        assert secret.decode("latin-1") not in text
    assert "ada-of-the-lovelaces" not in text


def document_id(secret: bytes = SECRET, keys: SigningKeys = KEYS, **fields: Any) -> str:
    status = {name: fields.pop(name) for name in ("finished",) if name in fields}
    signed = Issuing(secret, keys).issue(ended(asked(**fields), **status), BUNDLE)
    assert signed is not None
    return signed.document.id


def test_the_id_is_the_questions_and_the_callers() -> None:
    """Job, time and signing key are no part of it; secret, owner and question are."""
    same = document_id()
    assert document_id(id="b", finished=5.0, keys=SigningKeys(b"o" * 32, SECRET)) == same
    assert document_id(created=3.0, traceparent="00", file_sha256="0" * 64) == same
    others = [
        document_id(secret=b"t" * 32),
        document_id(owner="ada"),
        document_id(owner="bob"),
        document_id(alpha=0.002),
        document_id(sigma=0.3),
    ]
    assert len({same, *others}) == 6
    assert all(len(each) == 22 for each in (same, *others))


@pytest.mark.parametrize(
    "status",
    [
        ended(estimation=(100, 0, 100, 0)),
        ended(asked(mode=Mode.PREDICT, n0=0), selection=(0, 0, 0, 0)),
        ended(state=State.CANCELLED),
        ended(asked(file_sha256="")),
    ],
    ids=["abstention", "predict", "cancelled", "of an older release"],
)
def test_only_what_was_certified_has_a_certificate(status: Any) -> None:
    """An abstention and an uncertified answer have none."""
    assert Issuing(SECRET, KEYS).issue(status, BUNDLE) is None


# Over HTTP


async def test_an_answer_has_its_certificate(service: Service) -> None:
    """The answer, the job and the certificate's own address have one document, which verifies."""
    answered = (await service.ask()).json()
    text = (
        await service.client.get(f"/certificates/{answered['certificate']['document']['id']}")
    ).text
    assert json.loads(text) == answered["certificate"]
    assert (await service.client.get(f"/jobs/{answered['id']}")).json()["result"] == answered
    jwks = (await service.client.get("/.well-known/jwks.json")).json()
    _, checks = Verifier(text.encode(), jwks, PNG, BUNDLE).checks()
    assert all(check.passed for check in checks), checks
    result = answered["certificate"]["document"]["result"]
    assert [result[name] for name in ("label", "radius", "p_lower")] == [
        answered[name] for name in ("label", "radius", "p_lower")
    ]
    assert answered["certificate"]["document"]["model"]["numerics"] == {"device": "none"}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "cohen"},
        {"method": "two-sided"},
        {"method": "anytime", "n": "500"},
        {"target_radius": "0.1", "n": "2000"},
        {"target_radius": "0.4", "n": "3000"},
    ],
    ids=["cohen", "two-sided", "anytime", "target reached", "target given up"],
)
async def test_every_answer_is_certified_as_it_was_reached(
    service: Service, fields: dict[str, str]
) -> None:
    """Certificate and answer agree for every method, wherever sampling stopped."""
    answered = (await service.ask(**fields)).json()
    text = json.dumps(answered["certificate"]).encode()
    document, checks = Verifier(text, KEYS.jwks, PNG, BUNDLE).checks()
    assert document is not None
    assert all(check.passed for check in checks), checks
    same = ("label", "label_index", "p_lower", "p_upper", "radius")
    assert {name: getattr(document.result, name) for name in same} == {
        name: answered[name] for name in same
    }
    asked = ("sigma", "alpha", "alpha_shares", "n0", "n", "target_radius", "method")
    assert {name: getattr(document.question, name) for name in asked} == {
        name: answered[name] for name in asked
    }
    assert (document.question.looks or []) == answered["looks"]
    assert document.noise.estimation == [0, answered["rows_used"] - answered["n0"]]


async def test_the_result_event_has_the_certificate(service: Service) -> None:
    """A certificate that came by an event is found at its address too."""
    location = (await service.ask(headers={"Prefer": "respond-async"})).headers["location"]
    name, result = events((await service.client.get(f"{location}/events")).text)[-1]
    found = await service.client.get(f"/certificates/{result['certificate']['document']['id']}")
    assert (name, found.json()) == ("result", result["certificate"])


@pytest.mark.parametrize(("votes", "mode"), [(split, "certify"), (None, "predict")])
async def test_an_uncertified_answer_has_none(votes: Any, mode: str) -> None:
    """The field is absent from an abstention and from an answer without a radius."""
    async with serving(**({"votes": votes} if votes else {})) as service:
        answered = (await service.ask(mode=mode)).json()
    assert "certificate" not in answered
    assert not answered["certified"]


async def test_a_certificate_belongs_to_its_caller() -> None:
    """Another key's is a 404, as is an unknown id, and each caller's id is its own."""
    async with serving(**TWO) as service:
        ids = {}
        for name, headers in (("ann", ANN), ("bob", BOB)):
            certified = (await service.ask(headers=headers)).json()["certificate"]
            ids[name] = certified["document"]["id"]
        assert ids["ann"] != ids["bob"]
        path = f"/certificates/{ids['ann']}"
        assert (await service.client.get(path, headers=ANN)).status_code == 200
        problem(await service.client.get(path, headers=BOB), 404, "not-found")
        problem(await service.client.get(path), 401, "unauthorized")
        problem(await service.client.get("/certificates/none", headers=ANN), 404, "not-found")
        assert (await service.client.get("/.well-known/jwks.json")).status_code == 200


async def test_a_deleted_jobs_certificate_is_gone(service: Service) -> None:
    """DELETE takes the certificate with its job; asking again makes the same id."""
    first = (await service.ask()).json()
    path = f"/certificates/{first['certificate']['document']['id']}"
    await service.client.delete(f"/jobs/{first['id']}")
    problem(await service.client.get(path), 404, "not-found")
    again = (await service.ask()).json()
    assert again["id"] != first["id"]
    assert again["certificate"]["document"]["id"] == first["certificate"]["document"]["id"]
    assert (await service.client.get(path)).json() == again["certificate"]


async def test_the_id_is_the_same_after_a_restart(tmp_path: Path) -> None:
    """A service with the same secret names the same question of the same caller alike."""
    ids = []
    for _ in range(2):
        async with serving(data_dir=tmp_path) as service:
            ids.append((await service.ask()).json()["certificate"]["document"]["id"])
    assert ids[0] == ids[1]


async def test_the_jwks_is_public(service: Service) -> None:
    """The keys come as a JWK Set, without a private member."""
    response = await service.client.get("/.well-known/jwks.json")
    assert response.headers["content-type"] == "application/jwk-set+json"
    assert response.json() == KEYS.jwks
    assert '"d"' not in response.text


async def test_two_waiting_callers_have_one_certificate(service: Service) -> None:
    """Requests of one question at once have one id, whichever job is named last."""
    both = await asyncio.gather(service.ask(), service.ask())
    first, second = (each.json()["certificate"]["document"] for each in both)
    assert first["id"] == second["id"]
