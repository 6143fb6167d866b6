"""service/predictions/verification.py: what passes, and that whatever is changed is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.predictions.verification import Refused, Verifier, array_of, job_of
from service.signing import SigningKeys, canonical
from tests.support.certificates import BUNDLE, answered, asked, ended, issued, resigned
from tests.support.serving import KEYS, PIXELS, PNG, SECRET, png

METHODS = {
    method: issued(answered(method))
    for method in ("cohen", "two-sided", "anytime", "early", "cascade")
}
GIVEN = METHODS["cohen"]
TEXT = json.dumps(GIVEN, separators=(",", ":")).encode()
OTHER_KEYS = SigningKeys(b"o" * 32, SECRET)
PARTS = 8


def failures(text: bytes, **parts: Any) -> dict[str, str]:
    """The checks that fail, with their reasons."""
    given = {"jwks": KEYS.jwks, "image": PNG, "bundle": BUNDLE, **parts}
    _, checks = Verifier(text, **given).checks()
    return {check.name: check.detail for check in checks if check.passed is False}


def test_a_certificate_passes_every_check() -> None:
    """The service's own certificate passes, and each check says what it found."""
    _, checks = Verifier(TEXT, KEYS.jwks, PNG, BUNDLE).checks()
    assert all(check.passed for check in checks)
    assert {check.name: check.detail for check in checks} == {
        "format": "urn:vouchsafe:certificate:1",
        "document": "is the signed payload",
        "signature": f"by key {KEYS.kid} of the JWKS",
        "statistics": GIVEN["document"]["statement"],
        "model": "is that of task small",
        "commitment": "to one of 1 noise secrets that the JWKS publishes",
        "image": "is the file that was sent, and makes the certified array",
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_certificates(method: str) -> None:
    """What each procedure proves is recomputed, whether or not it stopped early."""
    assert not failures(json.dumps(METHODS[method]).encode())
    document, _ = Verifier(json.dumps(METHODS[method]).encode()).checks()
    assert document is not None
    job = answered(method).job
    assert job_of(document, array_of(document, PNG), SECRET).key == job.key


def test_without_keys_the_signer_is_named_and_nothing_claimed() -> None:
    """Without a JWKS the check of the signature says whose it is, and no more."""
    _, checks = Verifier(TEXT).checks()
    (check,) = [check for check in checks if check.name == "signature"]
    says = f"not checked: says it is signed by key {KEYS.kid} (give --jwks)"
    assert (check.passed, check.detail) == (None, says)
    head, payload, _ = GIVEN["jws"].split(".")
    text = json.dumps({**GIVEN, "jws": f"{head}.{payload}.{'A' * 86}"}).encode()
    assert Verifier(text).checks()[1] == checks


def test_a_false_signature_ends_the_work() -> None:
    """Bounds are computed for what was signed alone."""
    _, checks = Verifier(TEXT, OTHER_KEYS.jwks).checks()
    found = {check.name: check.passed for check in checks}
    assert (found["signature"], found["statistics"]) == (False, None)


def test_rounding_is_allowed() -> None:
    """Norms are 255 times the radius: the tolerance is in parts of a value above 1."""
    for error, fails in ((0.9e-8, False), (1.1e-8, True)):
        document = copy.deepcopy(GIVEN["document"])
        document["result"]["norms"]["l2_gray_levels"] *= 1 + error
        assert bool(failures(resigned(document))) is fails
        document = copy.deepcopy(METHODS["cascade"]["document"])
        document["result"]["stages"][0]["radius"] += error
        assert bool(failures(resigned(document))) is fails


@pytest.mark.parametrize("part", range(PARTS))
def test_every_changed_byte_is_refused(part: int) -> None:
    """One bit of any byte of document or JWS is noticed, unless the value is the same."""
    same = 0
    for at in range(part, len(TEXT), PARTS):
        changed = bytearray(TEXT)
        changed[at] ^= 1
        if not failures(bytes(changed), image=None, bundle=None):
            assert json.loads(changed) == GIVEN, at
            same += 1
    assert same <= 2  # A last digit that writes the same double.


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document, sections included."""
    if path:
        yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from leaves(inner, (*path, key))


def parent(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.01
    if isinstance(value, str):
        return value[:-1] + ("b" if value.endswith("a") else "a")
    return {} if isinstance(value, list) else []


FIELDS = [
    pytest.param(method, path, id=f"{method}.{'.'.join(map(str, path))}")
    for method, given in METHODS.items()
    for path in leaves(given["document"])
]
UNVERIFIABLE = {
    ("id",),
    ("model", "task"),
    ("service", "version"),
    ("subject", "file_sha256"),
    *(("subject", "preprocessing", step) for step in ("resize", "crop", "color")),
}
"""Statements of the signer that nothing else in a certificate decides."""
FIRST_LOOK = {("evidence", "looks", 0, 1), ("evidence", "looks", 0, 2)}
WORDS = {
    "early": FIRST_LOOK | {("question", "target_radius")},
    "anytime": FIRST_LOOK | {("evidence", "looks", 1, 1), ("evidence", "looks", 1, 2)},
}
"""More of them: votes at looks that prove less than later ones, and a target that was reached."""


@pytest.mark.parametrize(("method", "path"), FIELDS)
def test_every_changed_field_is_refused(method: str, path: tuple[Any, ...]) -> None:
    """A field that differs from the signed one is refused, and so is one that is gone."""
    for change in (lambda at, key: at.update({key: other(at[key])}), lambda at, key: at.pop(key)):
        value = copy.deepcopy(METHODS[method])
        inner = parent(value["document"], path)
        if isinstance(inner, list):
            inner[path[-1]] = other(inner[path[-1]])
        else:
            change(inner, path[-1])
        assert "document" in failures(json.dumps(value).encode())


@pytest.mark.parametrize(("method", "path"), FIELDS)
def test_a_signed_lie_is_refused(method: str, path: tuple[Any, ...]) -> None:
    """A field that does not fit the others is refused although the service's key signed it."""
    document = copy.deepcopy(METHODS[method]["document"])
    inner = parent(document, path)
    inner[path[-1]] = other(inner[path[-1]])
    is_word = path in UNVERIFIABLE or path in WORDS.get(method, ())
    assert bool(failures(resigned(document))) is not is_word


def test_every_changed_byte_of_the_jws_alone_is_refused() -> None:
    """Also the spare bits of base64url, which a lenient decoder ignores."""
    jws = GIVEN["jws"]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for end in letters.replace(jws[-1], ""):
        text = json.dumps({**GIVEN, "jws": jws[:-1] + end}).encode()
        assert failures(text, image=None, bundle=None)
    for odd in (f"{jws}=", f"{jws} ", f"{jws}.", jws.replace(".", "..", 1), ""):
        assert "format" in failures(json.dumps({**GIVEN, "jws": odd}).encode())


def test_another_key_is_refused_by_name() -> None:
    """A certificate that another key signed is refused, and both keys are named."""
    assert failures(TEXT, jwks=OTHER_KEYS.jwks) == {
        "signature": f"no key {KEYS.kid} in the JWKS; it has {OTHER_KEYS.kid}"
    }
    forged = json.dumps(issued(keys=OTHER_KEYS)).encode()
    assert "signature" in failures(forged)


def test_a_key_id_alone_is_no_key() -> None:
    """A JWKS that gives another key the signer's id is not believed."""
    (key,) = OTHER_KEYS.jwks["keys"]
    jwks = {"keys": [{**key, "kid": KEYS.kid}]}
    assert "signature" in failures(TEXT, jwks=jwks)


def test_a_payload_whose_signature_is_anothers_is_refused() -> None:
    """The signature of one certificate does not fit another's payload."""
    theirs = issued(ended(asked(owner="ada")))
    head, _, _ = theirs["jws"].split(".")
    mixed = f"{head}.{theirs['jws'].split('.')[1]}.{GIVEN['jws'].split('.')[2]}"
    text = json.dumps({"document": theirs["document"], "jws": mixed}).encode()
    assert failures(text) == {"signature": f"key {KEYS.kid} did not sign this"}


@pytest.mark.parametrize("alg", ["none", "HS256", "Ed25519"])
def test_no_other_algorithm_is_accepted(alg: str) -> None:
    """`alg` is pinned: a header that names another one is refused before any key is used."""
    from base64 import urlsafe_b64encode

    header = canonical({"alg": alg, "kid": KEYS.kid})
    head = urlsafe_b64encode(header).rstrip(b"=").decode()
    jws = ".".join([head, *GIVEN["jws"].split(".")[1:]])
    refused = failures(json.dumps({**GIVEN, "jws": jws}).encode())
    assert "only EdDSA is accepted" in refused["format"]


def test_repeated_keys_are_refused() -> None:
    """JSON whose object has a key twice is refused: readers would see two documents."""
    text = TEXT.replace(b'"n0":10', b'"n0":10,"n0":10', 1)
    assert failures(text) == {"format": "the key 'n0' stands twice in one object"}


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"jws":1,"document":{}}', b"[" * 9999]
)
def test_what_is_no_certificate_is_refused(text: bytes) -> None:
    """Any other text is a failed check, not a crash."""
    assert list(failures(text)) == ["format"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_are_finite(number: str) -> None:
    """A number that JSON does not have, or a double cannot hold, is refused."""
    text = TEXT.replace(b'"sigma":0.25', f'"sigma":{number}'.encode(), 1)
    assert list(failures(text)) == ["format"]


NORMS = GIVEN["document"]["result"]["norms"]
HUGE = {
    "shape": [3, 10**9, 10**9],
    "preprocessing": {**GIVEN["document"]["subject"]["preprocessing"], "resolution": 10**9},
}


@pytest.mark.parametrize(
    ("section", "fields", "check", "why"),
    [
        (
            "result",
            {"norms": {**NORMS, "patch_gray_levels": {}}},
            "statistics",
            "has : must have 1",
        ),
        ("subject", {"shape": [3, -8, -8]}, "statistics", "shape = "),
        ("subject", HUGE, "statistics", "resolution = 1000000000: must be 1 to 4096"),
        ("question", {"n": 100_001}, "statistics", "n = 100001: must be 1 to 100000"),
        ("question", {"sigma": 1e308}, "statistics", "sigma"),
        ("question", {"sigma": -0.25}, "statistics", "sigma = -0.25: must be 0.02 to 4.0"),
        ("question", {"sigma": 0.019}, "statistics", "sigma = 0.019: must be 0.02 to 4.0"),
        ("model", {"labels": ["x"] * 1001}, "statistics", "labels has 1001 entries"),
        ("question", {"looks": [*range(1, 66)]}, "statistics", "looks has 65 entries"),
        ("model", {"labels": ["x" * 2**21]}, "format", "at most 2097152 bytes"),
        ("question", {"alpha": 0.7}, "statistics", "alpha"),
        ("question", {"n0": 2**60}, "format", "exceeds safe integer domain"),
        ("model", {"labels": []}, "statistics", "label index below 0"),
        ("service", {"issued_at": "\u0662026-01-01T00:00:00Z"}, "format", "issued_at"),
    ],
)
def test_hostile_values_are_refused(
    section: str, fields: dict[str, Any], check: str, why: str
) -> None:
    """Values that a service never writes end in a failed check, not in a crash or a flood."""
    document = copy.deepcopy(GIVEN["document"])
    document[section] |= fields
    if check == "format":
        payload = json.dumps(
            document, separators=(",", ":"), sort_keys=True, ensure_ascii=False
        ).encode()
        text = json.dumps({"document": document, "jws": KEYS.sign(payload)}).encode()
    else:
        text = resigned(document)
    assert why in failures(text)[check]


def test_another_image_is_refused_by_name() -> None:
    """A certificate held against another image says which array it is about."""
    brighter = np.where(PIXELS < 255, PIXELS + 1, PIXELS).astype(np.uint8)
    ((name, why),) = failures(TEXT, image=png(brighter)).items()
    assert (name, why.partition(":")[0]) == (
        "image", f"array_sha256 = {GIVEN['document']['subject']['array_sha256']}"
    )  # fmt: skip
    assert "cannot be read" in failures(TEXT, image=b"no image")["image"]


def test_the_same_array_from_another_file_is_the_same_image() -> None:
    """The array is what was certified; that the file differs is said."""
    _, checks = Verifier(TEXT, image=PNG + b"\0").checks()
    assert checks[-1].passed
    assert "not the file that was sent" in checks[-1].detail


def test_another_task_is_refused() -> None:
    """A certificate of another bundle than the local task's is refused."""
    assert failures(TEXT, bundle=replace(BUNDLE, k=1.7)) == {
        "model": "task_digest: is not that of task small"
    }


def test_another_secret_of_the_operator_is_seen() -> None:
    """The commitment must be one that the service publishes."""
    jwks: Mapping[str, Any] = {**KEYS.jwks, "secret_commitments": ["0" * 64]}
    assert list(failures(TEXT, jwks=jwks)) == ["commitment"]


def test_a_replay_asks_the_very_question() -> None:
    """The job made of a certificate has the noise key of the job that was certified."""
    document, _ = Verifier(TEXT).checks()
    assert document is not None
    again = job_of(document, array_of(document, PNG), SECRET)
    assert again.key == asked().key
    with pytest.raises(Refused, match="this noise secret has"):
        job_of(document, array_of(document, PNG), b"t" * 32)
