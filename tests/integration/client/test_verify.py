"""Verification in both clients, demonstrations, and folders as one signed batch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import client
from service.predictions.batches.verification import ManifestVerifier
from service.signing import SigningKeys
from tests.support.clients import BOTH
from tests.support.listening import listening
from tests.support.scripted import scripted
from tests.support.serving import KEYS, PIXELS, PNG, SECRET, Service, png, split

Made = Callable[..., Any]
both = pytest.mark.parametrize("made", BOTH)
PICTURE = "data:image/png;base64,iVBORw0KGgo="


@both
def test_a_certificate_is_verified(made: Made, tmp_path: Path) -> None:
    """As an answer, a document and a file; by the service's keys, or by those that are given."""
    with listening(Service(data_dir=tmp_path)) as running, made(running.url) as asking:
        answer = asking.predict(PNG, n=200)
        certificate, keys = answer["certificate"], asking.public_keys()
        file, jwks = tmp_path / "certificate.json", tmp_path / "jwks.json"
        file.write_text(json.dumps(certificate))
        jwks.write_text(json.dumps(keys))
        for given in (answer, certificate, file, str(file)):
            found = asking.verify(given)
            assert {each["name"]: each["passed"] for each in found["checks"]} == dict.fromkeys(
                ("format", "document", "signature", "statistics", "model", "commitment"), True
            )
            assert (found["passed"], found["document"]) == (True, certificate["document"])
        others = SigningKeys(b"o" * 32, SECRET).jwks
        pictures = tmp_path / "a.png", tmp_path / "b.png"
        pictures[0].write_bytes(PNG)
        pictures[1].write_bytes(png(255 - PIXELS))
        for given, image, passed in (
            (jwks, None, True),
            (others, None, False),
            (keys, pictures[0], True),
            (keys, PNG, True),
            (keys, pictures[1], False),
        ):
            assert asking.verify(file, given, image=image)["passed"] is passed


@both
def test_what_is_false_fails_and_what_is_none_is_refused(made: Made, tmp_path: Path) -> None:
    """A changed radius is a failed check; a missing or foreign document is a ValueError."""
    with listening(Service(data_dir=tmp_path)) as running, made(running.url) as asking:
        certificate = asking.predict(PNG, n=200)["certificate"]
        changed = copy.deepcopy(certificate)
        changed["document"]["result"]["radius"] += 0.1
        found = asking.verify(changed)
        assert not found["passed"]
        assert [each["name"] for each in found["checks"] if each["passed"] is False] == ["document"]
        for given, reason in (
            ({"certificate": None}, "only a certified answer has one"),
            ({"document": {}, "jws": "a.b"}, "this is no certificate: a compact JWS has 3 parts"),
        ):
            with pytest.raises(ValueError, match=reason):
                asking.verify(given)
        with pytest.raises(ValueError, match="JWKS"):
            asking.verify(certificate, {})
        with pytest.raises(FileNotFoundError):
            asking.verify(tmp_path / "missing.json")


def test_a_missing_library_is_named() -> None:
    """`verify` says what to install where SciPy is missing, and the client loads without it."""
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from service.client import Client\n"
        "Client().verify({'document': {}, 'jws': ''}, {'keys': []})\n"
    )
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "ImportError: verify needs the service's libraries" in run.stderr
    assert "scipy" in run.stderr
    assert "pip install . in the checkout" in run.stderr


@both
def test_demonstrations_are_those_of_the_service(made: Made, tmp_path: Path) -> None:
    """Rows and an attack; a field outside its limits is refused."""
    service = Service(data_dir=tmp_path)
    sample = {"noisy": PICTURE, "denoised": PICTURE, "label": 2}
    rows = {"seen": PICTURE, "samples": [sample] * 6}
    attack = {"seen": PICTURE, "image": PICTURE, "l2": 0.497, "steps": 20}
    with listening(service) as running, made(running.url) as asking:
        service.voter.result = json.dumps(rows).encode()
        shown = asking.demonstrate(PNG, sigma=0.5)
        assert (shown["status"], shown["kind"], shown["sigma"]) == ("done", "rows", 0.5)
        assert [each["label"] for each in shown["samples"]] == ["cat"] * 6
        service.voter.result = json.dumps(attack).encode()
        shown = asking.demonstrate(PNG, "attack", epsilon=0.5)
        assert (shown["l2"], shown["image"]) == (0.497, PICTURE)
        with pytest.raises(client.InvalidRequest, match="epsilon"):
            asking.demonstrate(PNG, kind="attack")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures, of which one is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in (("a.png", PNG), ("b.png", PNG), ("c.png", b"no")):
        (folder / name).write_bytes(content)
    return folder


@both
def test_a_folder_is_one_batch_with_a_manifest(made: Made, pictures: Path, tmp_path: Path) -> None:
    """Each picture has its share of alpha, and the signed list has every certificate."""
    manifest, out = tmp_path / "manifest.json", tmp_path / "answers.csv"
    asked = {"n": 200, "family_alpha": 0.01, "manifest": manifest, "out": out}
    with listening(Service(data_dir=tmp_path / "data")) as running, made(running.url) as asking:
        found = {Path(each.name).name: each for each in asking.predict_many(pictures, **asked)}
        assert sorted(found) == ["a.png", "b.png", "c.png"]
        assert 0.0033 < found["a.png"].answer["alpha"] <= 0.01 / 3
        assert (found["c.png"].answer, type(found["c.png"].error)) == (None, client.InvalidRequest)
        assert out.read_text().count("\n") == 4
        with pytest.raises(ValueError, match="manifest needs family_alpha"):
            list(asking.predict_many(pictures, manifest=manifest))
        with pytest.raises(client.InvalidRequest, match="alpha"):
            list(asking.predict_many(pictures, **{**asked, "family_alpha": 0.9}))
    checks = ManifestVerifier(manifest.read_bytes(), KEYS.jwks).checks()
    assert all(check.passed for check in checks), checks
    document = json.loads(manifest.read_text())["document"]
    assert (document["family_alpha"], document["m"]) == (0.01, 3)
    assert [each["index"] for each in document["certificates"]] == [0, 1]


@both
def test_a_batch_that_nobody_reads_is_erased(made: Made, pictures: Path, tmp_path: Path) -> None:
    """Closing the iterator deletes the batch, and no manifest is written."""
    manifest = tmp_path / "manifest.json"
    service = Service(split, data_dir=tmp_path / "data")
    with listening(service) as running, made(running.url) as asking:
        answers = asking.predict_many(pictures, n=200, family_alpha=0.01, manifest=manifest)
        next(answers)
        assert len(list((tmp_path / "data" / "batches").iterdir())) == 1
        answers.close()
        assert list((tmp_path / "data" / "batches").iterdir()) == []
    assert not manifest.exists()


@both
def test_results_that_end_early_are_unreachable(made: Made, pictures: Path, tmp_path: Path) -> None:
    """A stream without every line leaves no manifest."""
    begun = {"id": "b", "total": 3}
    line = json.dumps({"index": 1, "name": "b.png", "state": "succeeded", "result": {"label": "x"}})
    with scripted((202, {}, begun), (200, {}, f"{line}\n")) as server, made(server.url) as asking:
        answers = asking.predict_many(pictures, family_alpha=0.01, manifest=tmp_path / "m.json")
        assert next(answers).name == str(pictures / "b.png")
        with pytest.raises(client.Unreachable, match="batch b ended early"):
            next(answers)
    assert not (tmp_path / "m.json").exists()
