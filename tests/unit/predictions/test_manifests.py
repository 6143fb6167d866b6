"""service/predictions/batches/verification.py: manifests, and the certificates that they list."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.predictions.batches import runner
from service.predictions.batches.schemas import TYPE
from service.predictions.batches.service import manifest_statement
from service.predictions.batches.verification import ManifestVerifier
from service.predictions.certificate import Issuing
from service.predictions.results import to_response
from service.signing import SigningKeys, canonical
from tests.support.certificates import BUNDLE, asked, ended, resigned
from tests.support.serving import KEYS, NUMERICS, PNG, SECRET, png, serving

OTHER_KEYS = SigningKeys(b"o" * 32, SECRET)


@pytest.fixture
async def batch(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest of two certified images and a bad one, and the batch's lines by index."""
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    images = [PNG, b"no image", png(np.zeros((8, 8, 3), dtype=np.uint8))]
    async with serving() as service:
        files = [("images", (f"{index}.png", image)) for index, image in enumerate(images)]
        sent = await service.client.post("/batches", files=files, data={"alpha": "0.01"})
        location = sent.headers["location"]
        text = (await service.client.get(f"{location}/results")).text
        manifest = (await service.client.get(f"{location}/manifest")).json()
    lines = sorted(map(json.loads, text.splitlines()), key=lambda line: int(line["index"]))
    return manifest, lines


def failures(
    text: bytes, lines: list[dict[str, Any]] | None = None, **parts: Any
) -> dict[str, str]:
    """The checks that fail, with their reasons."""
    results = None if lines is None else [json.dumps(line).encode() for line in lines]
    given = {"jwks": KEYS.jwks, "results": results, **parts}
    return {
        check.name: check.detail
        for check in ManifestVerifier(text, **given).checks()
        if check.passed is False
    }


async def test_a_manifest_passes_with_its_results(batch: Any) -> None:
    """The service's own passes; without keys or results nothing is said of them."""
    manifest, lines = batch
    text = json.dumps(manifest).encode()
    assert not failures(text, lines)
    found = {check.name: check.passed for check in ManifestVerifier(text).checks()}
    assert found == {"format": True, "document": True, "signature": None, "alpha": True}


async def test_a_signed_lie_is_refused(batch: Any) -> None:
    """Shares above the family's alpha, repeated images, and another statement are refused."""
    document = batch[0]["document"]
    first = document["certificates"][0]
    for fields, why in (
        ({"alpha": 0.01}, "alpha = 0.01"),
        ({"m": 2}, "alpha = "),
        ({"family_alpha": 0.1}, "alpha = "),
        ({"statement": "All is well."}, "statement: must be"),
        ({"certificates": [first, first]}, "index = [0, 0]"),
        ({"certificates": [{**first, "index": 3}]}, "index = [3]"),
    ):
        changed = resigned({**document, **fields})
        assert why in failures(changed)["alpha"]
    assert "format" in failures(resigned({**document, "more": 1}))
    assert "format" in failures(b"{}")


async def test_another_document_or_key_is_refused(batch: Any) -> None:
    """What was not signed, and what another key signed."""
    manifest, lines = batch
    changed = json.dumps({**manifest, "document": {**manifest["document"], "m": 4}}).encode()
    assert list(failures(changed)) == ["document"]
    text = json.dumps(manifest).encode()
    assert [*failures(text, lines, jwks=OTHER_KEYS.jwks)] == ["signature", "results"]


async def test_other_results_are_refused_by_index(batch: Any) -> None:
    """A certificate that is missing, added, changed, exchanged, or of another question."""
    manifest, lines = batch
    text = json.dumps(manifest).encode()
    without = copy.deepcopy(lines)
    del without[2]["result"]["certificate"]
    added = copy.deepcopy(lines)
    added[1]["result"] = lines[0]["result"]
    changed = copy.deepcopy(lines)
    changed[0]["result"]["certificate"]["document"]["result"]["radius"] = 9.0
    exchanged = copy.deepcopy(lines)
    exchanged[0]["result"], exchanged[2]["result"] = lines[2]["result"], lines[0]["result"]
    larger = copy.deepcopy(lines)
    larger[2]["result"]["radius"] = 9.0
    claimed = copy.deepcopy(lines)
    claimed[1]["result"] = {"label": "dog", "radius": 9.0, "certified": True}
    for odd, why in (
        (without, "index 2: its answer is certified without a certificate"),
        (lines[:2], "index 2: the results have no certificate of it"),
        (added, "index 1: the manifest lists no certificate of it"),
        (changed, "index 0: document: document differs"),
        (exchanged, "index 0: its document has the SHA-256"),
        (larger, "index 2: radius = 9.0: certified is 0."),
        (claimed, "index 1: its answer is certified without a certificate"),
        ([lines[0], lines[2]], "the results have 2 lines: must be one of each of m images"),
        ([*lines, lines[1]], "the results have 4 lines"),
        ([lines[0], lines[2], {"index": 3}], "the results have 3 lines"),
        ([{"no": "index"}], "a line of the results has no index"),
        ([{"index": True}], "a line of the results has no index"),
    ):
        assert failures(text, odd)["results"].startswith(why)


async def test_the_command_reads_manifests(batch: Any, tmp_path: Any) -> None:
    """`vouchsafe verify manifest.json --jwks FILE --results FILE`, a line a check."""
    manifest, lines = batch
    for name, text in (
        ("manifest.json", json.dumps(manifest)),
        ("jwks.json", json.dumps(dict(KEYS.jwks))),
        ("results.ndjson", "".join(json.dumps(line) + "\n" for line in lines)),
    ):
        (tmp_path / name).write_text(text)
    given = ["verify", str(tmp_path / "manifest.json"), "--jwks", str(tmp_path / "jwks.json")]
    ran = CliRunner().invoke(app, [*given, "--results", str(tmp_path / "results.ndjson")])
    assert ran.exit_code == 0, ran.output
    assert [line.split()[:2] for line in ran.stdout.splitlines()] == [
        ["ok", name] for name in ("format", "document", "signature", "alpha", "results")
    ]
    (tmp_path / "results.ndjson").write_text("")
    ran = CliRunner().invoke(app, [*given, "--results", str(tmp_path / "results.ndjson")])
    assert (ran.exit_code, "FAIL results" in ran.stdout) == (1, True)
    for of_a_certificate in (["--task", "default"], ["--image", str(tmp_path / "jwks.json")]):
        ran = CliRunner().invoke(app, [*given, *of_a_certificate])
        assert (ran.exit_code, "as a manifest" in ran.output) == (2, True)


async def test_labels_of_any_length_fit() -> None:
    """A certificate is read in UTF-8, as it was sent: 1,000 labels of 128 emoji are 1.2 MB."""
    labels = tuple(f"{index:04}".ljust(128, "\N{GRINNING FACE}") for index in range(1000))
    bundle = replace(BUNDLE, labels=labels)
    votes = (0, 0, 9, 1, *[0] * 996)
    job = asked(
        classes=1000, n0=10, n=100, task_digest=bundle.digest, bundle=bundle.served_digest(NUMERICS)
    )
    status = ended(job, selection=votes, estimation=tuple(10 * count for count in votes))
    signed = Issuing(SECRET, KEYS).issue(status, bundle)
    answer = to_response(status, labels, signed).model_dump(mode="json")
    document = answer["certificate"]["document"]
    listed = {
        "index": 0,
        "id": document["id"],
        "sha256": hashlib.sha256(canonical(document)).hexdigest(),
    }
    manifest = resigned(
        {
            "type": TYPE,
            "batch": "a",
            "statement": manifest_statement(job.alpha, job.alpha, 1, 1),
            "family_alpha": job.alpha,
            "alpha": job.alpha,
            "m": 1,
            "certificates": [listed],
            "service": document["service"],
        }
    )
    assert not failures(manifest, [{"index": 0, "result": answer}])
