"""Verifies a certificate of Vouchsafe without Vouchsafe, as docs/certificate.md describes it.

`python verify_certificate.py certificate.json jwks.json` prints the statement and exits with 0, or
prints the reason for the refusal and exits with 1. It needs Python 3.11 and `cryptography`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Callable
from math import acos, exp, lgamma, log, log1p, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TOLERANCE = 1e-9
quantile = NormalDist().inv_cdf


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


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction."""
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    scale = lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)
    return exp(scale) * fraction / a


def last(holds: Callable[[float], bool], high: float = 1.0) -> float:
    """The largest p in [0, high] up to which the condition holds, by bisection."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def clopper_pearson(k: int, n: int, level: float) -> float:
    """The p at which k or more of n rows have this probability."""
    return last(lambda p: incomplete_beta(k, n - k + 1, p) < level) if k else 0.0


def anytime(k: int, n: int, level: float) -> float:
    """The p up to which the e-process against smaller ones is above 1 / level."""

    def log_e(p: float) -> float:
        mass = lgamma(k + 0.5) + lgamma(n - k + 0.5) - lgamma(n + 1)
        mass += log(1 - incomplete_beta(k + 0.5, n - k + 0.5, p)) - log(2 * acos(sqrt(p)))
        return mass - k * log(p) - (n - k) * log1p(-p)

    return last(lambda p: log_e(p) > -log(level), k / n) if k else 0.0


def votes_of(document: dict[str, Any], name: str, rows: int) -> list[int]:
    """The votes by label index; they must be those of the rows that were drawn."""
    votes = [0] * len(document["model"]["labels"])
    for index, count in document["evidence"][f"{name}_counts"].items():
        votes[int(index)] = int(count)
        need(count > 0, f"{name}_counts holds a number below 1")
    need(sum(votes) == rows, f"{name}_counts do not sum to {rows}")
    need(document["noise"][name] == [0, rows], f"noise.{name} is not [0, {rows}]")
    return votes


def check_shares(question: dict[str, Any]) -> None:
    """Refuse any other division of alpha than the method's."""
    method, alpha, shares = question["method"], question["alpha"], question["alpha_shares"]
    need(method in ("cohen", "two-sided", "anytime"), "the method is another one")
    target = question["target_radius"] is not None
    spent = {"looks": alpha * (0.2 if target else 0.1)} if method == "anytime" else {}
    if method != "cohen":
        spent["runner_up"] = 0.1 * (alpha - sum(spent.values()))
    spent["label"] = alpha - sum(spent.values())
    same = spent.keys() == shares.keys() and sum(shares.values()) <= alpha * (1 + 1e-15)
    same = same and all(abs(shares[name] - spent[name]) <= 1e-12 * alpha for name in spent)
    need(same, "alpha is divided otherwise")
    need(method == "anytime" or not (target or question["looks"]), "the method has no looks")


def prove(document: dict[str, Any], tv: float) -> dict[str, Any]:
    """The result that question and evidence prove, without norms."""
    question, shares = document["question"], document["question"]["alpha_shares"]
    n, sigma, early = int(question["n"]), question["sigma"], question["method"] == "anytime"
    looks = [[int(number) for number in look] for look in document["evidence"]["looks"]]
    if early:
        schedule = [int(number) for number in question["looks"]]
        need(schedule == sorted({*schedule}) and schedule[-1] == n, "looks do not ascend to n")
        drawn = [look[0] for look in looks]
        need(drawn == schedule[: len(looks)], "evidence.looks are not the schedule's")
    rows = looks[-1][0] if early else n
    selection = votes_of(document, "selection", int(question["n0"]))
    votes = votes_of(document, "estimation", rows)
    label = selection.index(max(selection))
    rival = max((i for i in range(len(votes)) if i != label), key=lambda i: (votes[i], -i))
    need(looks[-1:] == [[rows, votes[label], votes[rival]]] * early, "the last look is another one")
    p_lower, p_upper, radius = 0.0, None, 0.0
    for look, own, _ in looks:
        p_lower = max(p_lower, anytime(own, look, shares["looks"]) - tv)
        radius = sigma * quantile(p_lower) if p_lower > 0.5 else 0.0
    if rows == n:
        at_end = clopper_pearson(votes[label], n, shares["label"]) - tv
        others = 1 - at_end
        if question["method"] != "cohen":
            others_of_n = clopper_pearson(n - votes[rival], n, shares["runner_up"])
            others = p_upper = min(others, 1 - others_of_n + tv)
        if at_end > others:
            radius = max(radius, sigma / 2 * (quantile(at_end) - quantile(others)))
        p_lower = max(p_lower, at_end)
    need(radius > 0, "the votes prove no radius")
    return {
        "label": document["model"]["labels"][label],
        "label_index": label,
        "p_lower": p_lower,
        "runner_up": None if question["method"] == "cohen" else rival,
        "p_upper": p_upper,
        "radius": radius,
    }


def check(document: dict[str, Any], written: dict[str, Any]) -> None:
    """Refuse what does not follow; `written` is the document with its numbers as they stand."""
    question, result = document["question"], document["result"]
    need(document["type"] == "urn:vouchsafe:certificate:1", "the type is another one")
    need(document["noise"]["format"] == "aes256-ctr/discrete-gaussian/3", "other noise")
    channels, height, width = map(int, document["subject"]["shape"])
    values = channels * height * width
    tv = values * (5000 * question["sigma"] + 10) * 2.0**-62
    stated = document["evidence"]["total_variation"]
    need(abs(stated - tv) <= 1e-12 * tv, "total_variation is another one")
    check_shares(question)
    found = prove(document, tv)
    levels = 255 * found["radius"]
    found["l2_gray_levels"] = levels
    found["linf_gray_levels"] = found["brightness_gray_levels"] = levels / sqrt(values)
    patches = result["norms"]["patch_gray_levels"]
    need(all(1 <= int(side) <= min(height, width) for side in patches), "a patch is too large")
    found |= {side: levels / (int(side) * sqrt(channels)) for side in patches}
    for name, claimed in ({**result, **result["norms"], **patches}).items():
        if name in found:
            is_number = isinstance(claimed, float) and isinstance(found[name], float)
            close = is_number and abs(claimed - found[name]) <= TOLERANCE * max(1, found[name])
            need(close or claimed == found[name], f"{name} = {claimed}: proven is {found[name]}")
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
