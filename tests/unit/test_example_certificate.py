"""docs/examples: the shipped certificate, and the script that verifies it on its own."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.bundle import DEFAULT_TASK, read_bundle
from service.predictions.verification import Verifier
from service.signing import read_jwks
from tests.support.certificates import answered, issued, resigned
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


@pytest.mark.parametrize("method", ["cohen", "two-sided", "anytime", "early"])
def test_the_script_recomputes_every_method(tmp_path: Path, method: str) -> None:
    """Its own bisection and continued fraction reach what the service proved, to 1e-9."""
    document = issued(answered(method))["document"]
    ran = ran_on(tmp_path, document)
    assert (ran.returncode, ran.stdout) == (0, document["statement"] + "\n")
    for sign in (-1, 1):
        changed = {**document, "result": {**document["result"]}}
        changed["result"]["radius"] += sign * 1e-8
        assert "radius" in ran_on(tmp_path, changed).stdout


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
        ("cohen", "question", {"looks": [200]}, "the method has no looks"),
        ("cohen", "question", {"alpha": 0.01}, "alpha is divided otherwise"),
        ("early", "question", {"target_radius": None}, "alpha is divided otherwise"),
        ("cohen", "question", {"method": "better"}, "method"),
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
