"""docs/examples: the shipped certificate, and the script that verifies it on its own."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.bundle import DEFAULT_TASK, read_bundle
from service.predictions.verification import Verifier
from service.signing import canonical, read_jwks
from tests.support.certificates import answered, asked, issued, resigned
from tests.support.paths import ROOT
from tests.support.serving import KEYS

EXAMPLES = ROOT / "docs" / "examples"
SCRIPT = EXAMPLES / "verify_certificate.py"
CERTIFICATE, JWKS = EXAMPLES / "certificate.json", EXAMPLES / "jwks.json"


def script(certificate: Path, jwks: Path) -> subprocess.CompletedProcess[str]:
    """The script, run where this project cannot be imported."""
    command = [sys.executable, "-I", str(SCRIPT), str(certificate), str(jwks)]
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603


def test_the_example_verifies_without_this_project() -> None:
    """The script accepts the shipped certificate, and prints what it states."""
    ran = script(CERTIFICATE, JWKS)
    statement = json.loads(CERTIFICATE.read_text())["document"]["statement"]
    assert (ran.returncode, ran.stdout) == (0, f"{statement}\n"), ran.stderr


def test_the_example_verifies_here() -> None:
    """So does the service's own verifier, with the image and the task that ship beside it."""
    image, jwks = (ROOT / "docs" / "ship.png").read_bytes(), read_jwks(JWKS.read_bytes())
    bundle = read_bundle(DEFAULT_TASK)
    _, checks = Verifier(CERTIFICATE.read_bytes(), jwks, image, bundle).checks()
    assert all(check.passed for check in checks), checks


def test_the_script_shares_no_code_with_the_project() -> None:
    """It imports the standard library and `cryptography`, and nothing else."""
    imports = [node for node in ast.walk(ast.parse(SCRIPT.read_text()))
               if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"cryptography"}


def ran_on(folder: Path, document: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """The script on a document that the service's key signed."""
    (folder / "certificate.json").write_bytes(resigned(document))
    (folder / "jwks.json").write_text(json.dumps(KEYS.jwks))
    return script(folder / "certificate.json", folder / "jwks.json")


@pytest.mark.parametrize("method", ["cohen", "two-sided", "anytime", "early", "cascade"])
def test_the_script_recomputes_every_method(tmp_path: Path, method: str) -> None:
    """Its own bisection and continued fraction reach what the service proved, to 1e-8."""
    document = issued(answered(method))["document"]
    ran = ran_on(tmp_path, document)
    assert (ran.returncode, ran.stdout) == (0, document["statement"] + "\n")
    for sign in (-1, 1):
        changed = {**document, "result": {**document["result"]}}
        changed["result"]["radius"] += sign * 2e-8
        assert "radius" in ran_on(tmp_path, changed).stdout


LAST = [200, 175, 20]


@pytest.mark.parametrize(
    ("method", "section", "fields", "reason"),
    [
        ("cohen", "result", {"p_lower": 0.9}, "p_lower = 0.9"),
        ("two-sided", "result", {"p_upper": None}, "p_upper = None"),
        ("two-sided", "result", {"runner_up": 3}, "runner_up = 3"),
        ("cohen", "result", {"label": "dog"}, "label = dog"),
        ("cohen", "result", {"label_index": 3}, "label_index = 3"),
        ("cohen", "evidence", {"estimation_counts": {"2": 201}}, "do not sum to 200"),
        ("cohen", "evidence", {"total_variation": 0}, "total_variation"),
        ("early", "evidence", {"looks": [[32, 28, 3], [96, 85, 9]]}, "the last look"),
        ("early", "evidence", {"looks": [[33, 28, 3], [96, 84, 9]]}, "evidence.looks"),
        ("early", "question", {"looks": [32, 96]}, "looks do not ascend to n"),
        ("early", "evidence", {"looks": [[32, 40, 0], [96, 84, 9]]}, "takes votes back"),
        ("early", "evidence", {"looks": [[32, 32, 0], [96, 30, 40]]}, "the last look"),
        ("anytime", "evidence", {"looks": [[32, 32, 0], [96, 30, 40], LAST]}, "takes votes back"),
        ("anytime", "evidence", {"looks": [[32, 20, 12], [96, 90, 6], LAST]}, "takes votes back"),
        ("anytime", "evidence", {"looks": [[32, 28, 4], [96, 88, 3], LAST]}, "do not fit"),
        ("anytime", "evidence", {"looks": [[32, 28, 3], [96, 88, 8], LAST]}, "do not fit"),
        ("anytime", "evidence", {"looks": [[32, 24, 2], [96, 84, 9], LAST]}, "are too few"),
        ("early", "evidence", {"looks": []}, "evidence.looks are not the schedule's"),
        ("cohen", "question", {"looks": [200]}, "the method has no looks"),
        ("cohen", "question", {"looks": []}, "the method has no looks"),
        ("cascade", "question", {"looks": [200, 400]}, "the method has no looks"),
        ("cohen", "evidence", {"looks": [[200, 175, 20]]}, "the method has no looks"),
        ("cohen", "question", {"sigma": 1e5}, "sigma is not 0.02 to 4"),
        ("cohen", "question", {"n": 100_001}, "n0 or n is not 1 to 100,000"),
        ("cohen", "question", {"n": 200.5}, "n is not of the form int"),
        ("cohen", "question", {"n": True}, "n is not of the form int"),
        ("cohen", "question", {"why": 1}, "question has other fields"),
        ("cohen", None, {"more": 1}, "other fields"),
        ("cohen", "evidence", {"selection_counts": {"-2": 9, "0": 1}}, "has no index below K"),
        ("cohen", "evidence", {"selection_counts": {"02": 9, "0": 1}}, "has no index below K"),
        ("cohen", "service", {"issued_at": 1.8e9}, "issued_at is not of the form time"),
        ("cohen", "model", {"adapter": "none"}, "adapter is not of the form hash?"),
        ("cohen", "subject", {"shape": [3, 8, 9]}, "shape is not [3, R, R]"),
        ("cohen", "question", {"alpha": 0.01}, "alpha is divided otherwise"),
        ("early", "question", {"target_radius": None}, "alpha is divided otherwise"),
        ("cohen", "question", {"method": "better"}, "method"),
        ("cohen", "question", {"sigma": [0.5, 0.25]}, "another number of sigma"),
        ("cohen", "evidence", {"passed_counts": []}, "the method has no passed stages"),
        ("cohen", "result", {"stages": []}, "result has other fields"),
        ("cascade", "question", {"sigma": 0.5}, "another number of sigma"),
        ("cascade", "question", {"sigma": [0.25, 0.5]}, "sigma does not descend"),
        ("cascade", "question", {"sigma": [0.5, 0.01]}, "sigma is not 0.02 to 4"),
        ("cascade", "evidence", {"passed_counts": [{"0": 200}]}, "a stage was not passed"),
        ("cascade", "evidence", {"passed_counts": [{"0": 20}]}, "do not sum to 200"),
        ("cascade", "noise", {"selection": [0, 10]}, "noise.selection is not [0, 20]"),
        ("cascade", "evidence", {"passed_counts": []}, "noise.selection is not [0, 10]"),
        ("cascade", "evidence", {"passed_counts": [{"0": 200}] * 4}, "more stages were read"),
        ("cascade", "result", {"stages": []}, "stages has another length"),
        ("cascade", "evidence", {"looks": [[200, 175, 20]]}, "the method has no looks"),
        ("cohen", "model", {"task_digest": "0" * 64}, "bundle is another hash"),
        ("cohen", "noise", {"estimation": [1, 200]}, "noise.estimation"),
        ("cohen", "noise", {"secret_commitment": "0" * 64}, "another noise secret"),
        ("cohen", None, {"statement": "Trust me."}, "the statement is another one"),
    ],
)
def test_the_script_refuses_a_signed_lie(
    tmp_path: Path, method: str, section: str | None, fields: dict[str, Any], reason: str
) -> None:
    """What the service's key signed and the votes do not prove is refused by name."""
    document = issued(answered(method))["document"]
    (document[section] if section else document).update(fields)
    ran = ran_on(tmp_path, document)
    assert ran.returncode == 1
    assert reason in ran.stdout, ran.stdout


def test_the_script_takes_true_for_no_number(tmp_path: Path) -> None:
    """In Python True equals 1.0, the sigma of a stage."""
    job = asked(method="cascade", sigma=1.0, stages=(1.0, 0.25), looks=(200, 400))
    document = issued(replace(answered("cascade"), job=job))["document"]
    assert ran_on(tmp_path, document).returncode == 0
    document["result"]["stages"][0]["sigma"] = True
    assert "sigma = True: proven is 1" in ran_on(tmp_path, document).stdout


@pytest.mark.parametrize(
    ("section", "field"),
    [("result", name) for name in ("p_lower", "p_upper", "runner_up", "label_index", "norms")]
    + [("norms", "linf_gray_levels"), ("patch_gray_levels", "4")],
)
def test_the_script_refuses_a_missing_field(tmp_path: Path, section: str, field: str) -> None:
    """A signed result leaves nothing out that the votes prove."""
    document = issued(answered("two-sided"))["document"]
    norms = document["result"]["norms"]
    del {**document, **document["result"], **norms}[section][field]
    ran = ran_on(tmp_path, document)
    assert (ran.returncode, f"{section} has other" in ran.stdout) == (1, True), ran.stdout


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"n":200', b'"n":2e2', "not canonical"),
        (b'"sigma":0.25', b'"sigma":1e999', "not finite"),
        (b'"sigma":0.25', b'"sigma":NaN', "not finite"),
        (b'"looks":[]', b'"looks":' + b"[" * 50_000, "RecursionError"),
    ],
)
def test_the_script_refuses_a_signed_text(
    tmp_path: Path, old: bytes, new: bytes, reason: str
) -> None:
    """A signed payload in another form than RFC 8785's is refused, whatever it says."""
    document = issued()["document"]
    payload = canonical(document)
    assert payload.count(old) == 1
    jws = KEYS.sign(payload.replace(old, new))
    (tmp_path / "certificate.json").write_text(json.dumps({"document": document, "jws": jws}))
    (tmp_path / "jwks.json").write_text(json.dumps(KEYS.jwks))
    ran = script(tmp_path / "certificate.json", tmp_path / "jwks.json")
    assert (ran.returncode, reason in ran.stdout) == (1, True), ran.stdout + ran.stderr


def test_the_script_has_the_canonical_form_of_rfc_8785() -> None:
    """Numbers, strings and the order of names are written as the service writes them."""
    spec = importlib.util.spec_from_file_location("verify_certificate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = [0, -0.0, 1.0, -4.5, 1e-6, 1e-7, 2.5e-10, 1e16, 1.2345678901234567e20, 1e21, 5e-324]
    value = {"\U0001f600": numbers, "ﬀ": [None, True, "€$\x0f\x7f\nA'B\"\\/"], "": {}}
    assert module.canonical(value).encode() == canonical(value)


def test_the_script_refuses_other_keys_and_other_documents(tmp_path: Path) -> None:
    """A certificate of another key, a document that was not signed, and a key that stands twice."""
    (tmp_path / "jwks.json").write_text(json.dumps(KEYS.jwks))
    assert "no key " in script(CERTIFICATE, tmp_path / "jwks.json").stdout
    changed = tmp_path / "changed.json"
    text = CERTIFICATE.read_text()
    for old, new, reason in (
        ('"n0": 100', '"n0": 101', "differs from the signed payload"),
        ('"n0": 100', '"n0": true', "differs from the signed payload"),
        ('"n0": 100', '"n0": 100, "n0": 100', "a key stands twice"),
        ('"jws": "e', '"jws": "f', "refused"),
    ):
        assert text.count(old) == 1
        changed.write_text(text.replace(old, new))
        ran = script(changed, JWKS)
        assert (ran.returncode, reason in ran.stdout) == (1, True), ran.stdout
