"""Verifies a certificate of Vouchsafe without Vouchsafe, as docs/certificate.md describes it.

`python verify_certificate.py certificate.json jwks.json` prints the statement and exits with 0, or
prints the reason for the refusal and exits with 1. It needs Python 3.11 and `cryptography`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from math import exp, fsum, lgamma, log, log1p, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TOLERANCE = 1e-9


class Refused(Exception):
    """The certificate must not be relied on."""


def need(condition: bool, reason: str) -> None:
    """Raise Refused with the reason unless the condition holds."""
    if not condition:
        raise Refused(reason)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys."""
    need(len(dict(pairs)) == len(pairs), "a key stands twice in one JSON object")
    return dict(pairs)


def parse(text: bytes, number: Any = float) -> Any:
    """The JSON value, whose numbers are given to `number` as they are written."""
    return json.loads(text, object_pairs_hook=distinct, parse_int=number, parse_float=number)


def unbase64(text: str) -> bytes:
    """The bytes of canonical base64url without padding."""
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    need(base64.urlsafe_b64encode(data).decode().rstrip("=") == text, "base64url is not canonical")
    return data


def signed_payload(jws: str, jwks: dict[str, Any]) -> bytes:
    """The payload of the JWS, once a key of the JWKS has signed it."""
    head, payload, signature = jws.split(".")
    header = parse(unbase64(head))
    need(set(header) == {"alg", "kid"} and header["alg"] == "EdDSA", "alg is not EdDSA")
    for key in jwks["keys"]:
        if (key.get("kty"), key.get("crv")) == ("OKP", "Ed25519"):
            required = f'{{"crv":"Ed25519","kty":"OKP","x":"{key["x"]}"}}'  # RFC 7638
            thumbprint = hashlib.sha256(required.encode()).digest()
            if base64.urlsafe_b64encode(thumbprint).decode().rstrip("=") == header["kid"]:
                public = Ed25519PublicKey.from_public_bytes(unbase64(key["x"]))
                public.verify(unbase64(signature), f"{head}.{payload}".encode())
                return unbase64(payload)
    raise Refused(f"no key {header['kid']} in the JWKS")


def tail(k: int, n: int, p: float) -> float:
    """The probability of k or more successes in n trials of probability p."""
    terms = (
        lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) + i * log(p) + (n - i) * log1p(-p)
        for i in range(k, n + 1)
    )
    return fsum(exp(term) for term in terms)


def clopper_pearson(k: int, n: int, alpha: float) -> float:
    """The p at which k or more of n rows have probability alpha, by bisection."""
    low, high = 0.0, k / n if k < n else 1.0
    while k and high - low > 1e-15:
        middle = (low + high) / 2
        low, high = (middle, high) if tail(k, n, middle) < alpha else (low, middle)
    return low


def check(document: dict[str, Any], written: dict[str, Any]) -> None:
    """Refuse what does not follow; `written` is the document with its numbers as they stand."""
    question, evidence, result = document["question"], document["evidence"], document["result"]
    need(document["type"] == "urn:vouchsafe:certificate:1", "the type is another one")
    need(document["noise"]["format"] == "philox4x32-10/discrete-gaussian/2", "other noise")
    need(question["method"] == "cohen", "the method is another one")
    n0, n, sigma = int(question["n0"]), int(question["n"]), question["sigma"]
    need(question["alpha_shares"] == {"p_lower": question["alpha"]}, "alpha is divided otherwise")
    counts = {}
    for name, rows in (("selection", n0), ("estimation", n)):
        counts[name] = {int(k): int(v) for k, v in evidence[f"{name}_counts"].items()}
        need(min(counts[name].values()) > 0, f"{name}_counts holds a number below 1")
        need(sum(counts[name].values()) == rows, f"{name}_counts do not sum to {rows}")
        need(document["noise"][name] == [0, rows], f"noise.{name} is not [0, {rows}]")
    top = max(counts["selection"].values())
    label = min(index for index, votes in counts["selection"].items() if votes == top)
    need(result["label_index"] == label, "another label has most selection votes")
    need(document["model"]["labels"][label] == result["label"], "the label has another index")
    channels, height, width = map(int, document["subject"]["shape"])
    values = channels * height * width
    tv = values * (5000 * sigma + 10) * 2.0**-62
    need(abs(evidence["total_variation"] - tv) <= 1e-12 * tv, "total_variation is another one")
    p_lower = clopper_pearson(counts["estimation"].get(label, 0), n, question["alpha"]) - tv
    need(p_lower > 0.5, "the votes prove no radius")
    radius = sigma * NormalDist().inv_cdf(p_lower)
    for name, claimed, found in (
        ("p_lower", result["p_lower"], p_lower),
        ("radius", result["radius"], radius),
        ("norms.l1", result["norms"]["l1"], radius),
        ("norms.l2", result["norms"]["l2"], radius),
        ("norms.linf", result["norms"]["linf"], radius / sqrt(values)),
    ):
        need(abs(claimed - found) <= TOLERANCE, f"{name} = {claimed}: the votes prove {found}")
    asked, shown = written["question"], json.dumps(result["label"], ensure_ascii=False)
    meant = (
        f"With probability at least 1 - {asked['alpha']} over the noise, the classifier smoothed "
        f"with sigma {asked['sigma']} gives the label {shown} to every image at an l2 distance "
        f"below {written['result']['radius']} from the subject, for pixels in [0, 1]; the label is "
        "stable, not proven correct."
    )
    need(document["statement"] == meant, "the statement is another one")


def main(certificate: str, jwks: str) -> int:
    """The exit status; prints the statement or the reason."""
    try:
        stated, keys = (parse(Path(file).read_bytes()) for file in (certificate, jwks))
        payload = signed_payload(stated["jws"], keys)
        document = parse(payload)
        same = (json.dumps(each, sort_keys=True) for each in (stated["document"], document))
        need(next(same) == next(same), "document differs from the signed payload")
        published = keys.get("secret_commitments", [document["noise"]["secret_commitment"]])
        need(document["noise"]["secret_commitment"] in published, "another noise secret")
        model = json.loads(payload)["model"]
        hashed = {"bundle": model["task_digest"], "numerics": model["numerics"]}
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()
        need(hashlib.sha256(text).hexdigest() == model["bundle"], "bundle is another hash")
        check(document, parse(payload, number=str))
    except (
        Refused,
        InvalidSignature,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        print(f"refused: {error!r}")
        return 1
    print(document["statement"])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
