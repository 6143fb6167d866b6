"""Verifies a certificate of Vouchsafe without Vouchsafe, as docs/certificate.md describes it.

`python verify_certificate.py certificate.json jwks.json` prints the statement and exits with 0, or
prints the reason for the refusal and exits with 1. It needs Python 3.11 and `cryptography`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from math import acos, exp, isfinite, lgamma, log, log1p, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TOLERANCE = 1e-8
SIDES = ("label", "others")
quantile = NormalDist().inv_cdf

PATTERNS = {
    "text": "(?s:.*)",
    "hash": "[0-9a-f]{64}",
    "id": "[A-Za-z0-9_-]{22}",
    "time": r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z",
}
FORM = {  # The fields of each object: NAME=KIND (see is_a; ~ may be absent), or another object.
    "": "type=text id=id statement=text subject model question noise evidence result service",
    "subject": "array_sha256=hash shape=[int] file_sha256=hash preprocessing",
    "preprocessing": "resize=text crop=text resolution=int color=text",
    "model": "task=text labels=[text] bundle=hash task_digest=hash denoiser adapter=hash? "
    "classifier tuned=hash? numerics=object",
    "denoiser": "kind=text files={hash}",
    "classifier": "kind=text files={hash}",
    "question": "sigma=number|[number] alpha=number alpha_shares={number} n0=int n=int "
    "target_radius=number? method=text looks=[int]?",
    "noise": "format=text secret_commitment=hash selection=[int] estimation=[int]",
    "evidence": "selection_counts={int} estimation_counts={int} passed_counts=[{int}]~ "
    "looks=[[int]] total_variation=number",
    "result": "label=text label_index=int p_lower=number runner_up=int? p_upper=number? "
    "radius=number stages=[object]~ norms",
    "norms": "l2_gray_levels=number linf_gray_levels=number brightness_gray_levels=number "
    "patch_gray_levels={number}",
    "service": "version=text issued_at=time",
}


def need(condition: bool, reason: str) -> None:
    """Raise ValueError with the reason unless the condition holds."""
    if not condition:
        raise ValueError(reason)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys."""
    need(len(dict(pairs)) == len(pairs), "a key stands twice in one JSON object")
    return dict(pairs)


def parse(text: bytes | str) -> Any:
    """The JSON value."""
    return json.loads(text, object_pairs_hook=distinct)


def canonical(value: Any) -> str:
    """The value's JSON in the canonical form of RFC 8785."""
    if isinstance(value, dict):
        names = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(name)}:{canonical(value[name])}" for name in names) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return json.dumps(value, ensure_ascii=False)
    number = float(value)
    need(isfinite(number), f"the number {value} is not finite")
    if number == 0 or 1e-6 <= abs(number) < 1e21:
        return f"{Decimal(repr(number or 0.0)):f}".removesuffix(".0")
    return re.sub("e([+-])0", r"e\1", repr(number))


def is_a(kind: str, value: Any) -> bool:
    """Whether the value is of the kind: [K] is a list, {K} an object of such values, K? or null."""
    if "|" in kind:
        return any(is_a(each, value) for each in kind.split("|"))
    if kind.endswith("?"):
        return value is None or is_a(kind[:-1], value)
    if kind[0] == "{":
        return isinstance(value, dict) and is_a(f"[{kind[1:-1]}]", [*value.values()])
    if kind[0] == "[":
        return isinstance(value, list) and all(is_a(kind[1:-1], each) for each in value)
    if kind in PATTERNS:
        return isinstance(value, str) and re.fullmatch(PATTERNS[kind], value) is not None
    types = {"object": dict, "int": int, "number": int | float}
    return isinstance(value, types[kind]) and not isinstance(value, bool)


def check_form(value: Any, section: str = "") -> None:
    """Refuse an object with unknown or missing fields, or fields of another kind."""
    fields = dict(field.partition("=")[::2] for field in FORM[section].split())
    absent = {name for name, kind in fields.items() if kind.endswith("~") and name not in value}
    same = isinstance(value, dict) and value.keys() == fields.keys() - absent
    need(same, f"{section} has other fields")
    for name in value:
        if kind := fields[name].rstrip("~"):
            need(is_a(kind, value[name]), f"{name} is not of the form {kind}")
        else:
            check_form(value[name], name)


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
    raise ValueError(f"no key {header['kid']} in the JWKS")


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


def dense(name: str, counts: dict[str, int], classes: int, rows: int) -> list[int]:
    """The votes by label index; `rows` is the number that voted."""
    need(counts.keys() <= {*map(str, range(classes))}, f"{name}_counts has no index below K")
    need(min(counts.values(), default=1) >= 1, f"{name}_counts holds a number below 1")
    need(sum(counts.values()) == rows, f"{name}_counts do not sum to {rows}")
    return [counts.get(str(index), 0) for index in range(classes)]


def votes_of(document: dict[str, Any], name: str, rows: int, stages: int = 1) -> list[int]:
    """The votes of the last stage; they must be those of the rows that were drawn."""
    drawn = [0, rows * stages]
    need(document["noise"][name] == drawn, f"noise.{name} is not {drawn}")
    counts = document["evidence"][f"{name}_counts"]
    return dense(name, counts, len(document["model"]["labels"]), rows)


def check_question(question: dict[str, Any]) -> None:
    """Refuse numbers out of range, and any other division of alpha than the method's."""
    is_cascade = question["method"] == "cascade"
    sigmas = question["sigma"] if is_cascade else [question["sigma"]]
    need(is_a("[number]", sigmas), "the method has another number of sigma")
    need(0.02 <= min(sigmas, default=0) <= max(sigmas) <= 4, "sigma is not 0.02 to 4")
    need(all(1 <= question[name] <= 100_000 for name in ("n0", "n")), "n0 or n is not 1 to 100,000")
    method, alpha, shares = question["method"], question["alpha"], question["alpha_shares"]
    need(1e-100 <= alpha <= 0.5, "alpha is not 1e-100 to 0.5")
    need(method in ("cohen", "two-sided", "anytime", "cascade"), "the method is another one")
    target = question["target_radius"] is not None
    spent = {"looks": alpha * (0.2 if target else 0.1)} if method == "anytime" else {}
    if is_cascade:
        need(2 <= len(sigmas) <= 4 and sigmas == sorted({*sigmas})[::-1], "sigma does not descend")
        sides = (f"stage_{i + 1}_{side}" for i in range(len(sigmas)) for side in SIDES)
        spent = dict.fromkeys(sides, alpha / (2 * len(sigmas)))
    elif method != "cohen":
        spent["runner_up"] = 0.1 * (alpha - sum(spent.values()))
    if not is_cascade:
        spent["label"] = alpha - sum(spent.values())
    same = spent.keys() == shares.keys() and sum(shares.values()) <= alpha * (1 + 1e-15)
    same = same and all(abs(shares[name] - spent[name]) <= 1e-12 * alpha for name in spent)
    need(same, "alpha is divided otherwise")
    has_looks = target or question["looks"] is not None
    need(method == "anytime" or not has_looks, "the method has no looks")


def check_looks(looks: list[list[int]], label: int, votes: list[int]) -> None:
    """Refuse looks whose votes no rows can cast; `votes` are those of the last look."""
    rivals = votes[:label] + votes[label + 1 :]
    need(looks[-1] == [sum(votes), votes[label], max(rivals)], "the last look is another one")
    for (rows_then, own_then, rival_then), (rows, own, rival) in pairwise([[0, 0, 0], *looks]):
        grown = rows - own - (rows_then - own_then)
        need(own >= own_then and grown >= 0, "a look takes votes back")
        need(0 <= rival - rival_then <= grown, "the largest other votes do not fit the rows")
        most = sum(min(count, rival) for count in rivals)
        need(rows - own <= most, "the largest other votes are too few")


def prove(document: dict[str, Any], tv: float) -> dict[str, Any]:
    """The result that question and evidence prove, without norms."""
    if document["question"]["method"] == "cascade":
        return prove_cascade(document, tv)
    need("passed_counts" not in document["evidence"], "the method has no passed stages")
    question, shares = document["question"], document["question"]["alpha_shares"]
    n, sigma, early = question["n"], question["sigma"], question["method"] == "anytime"
    looks = document["evidence"]["looks"]
    need(early or not looks, "the method has no looks")
    if early:
        schedule = question["looks"]
        need(len(schedule) <= 64, "there are more than 64 looks")
        ascends = [0, *schedule] == sorted({0, *schedule}) and schedule[-1] == n
        need(ascends, "looks do not ascend to n")
        drawn = [look[0] for look in looks]
        need(drawn == schedule[: len(looks) or 1], "evidence.looks are not the schedule's")
    rows = looks[-1][0] if looks else n
    selection = votes_of(document, "selection", question["n0"])
    votes = votes_of(document, "estimation", rows)
    label = selection.index(max(selection))
    rival = max((i for i in range(len(votes)) if i != label), key=lambda i: (votes[i], -i))
    if early:
        check_looks(looks, label, votes)
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


def prove_cascade(document: dict[str, Any], tv: float) -> dict[str, Any]:
    """The result of a cascade: the last stage's label, within the least of the stages' radii."""
    question, evidence = document["question"], document["evidence"]
    sigmas, n, level = question["sigma"], question["n"], question["alpha_shares"]["stage_1_label"]
    need(not evidence["looks"], "the method has no looks")
    passed, labels = evidence["passed_counts"], document["model"]["labels"]
    number = len(passed) + 1
    need(number <= len(sigmas), "more stages were read than there are")
    selection = votes_of(document, "selection", question["n0"], number)
    votes = votes_of(document, "estimation", n, number)
    label = selection.index(max(selection))

    def at_most(count: int) -> float:
        return 1 - clopper_pearson(n - count, n, level) + tv

    stages = []
    for sigma, counts in zip(sigmas, passed, strict=False):
        earlier = dense("passed", counts, len(labels), n)
        need(at_most(max(earlier)) <= 0.5 + TOLERANCE, "a stage was not passed")
        p_upper = at_most(max(earlier[:label] + earlier[label + 1 :]))
        radius = max(0.0, -sigma * quantile(p_upper))
        stages.append({"sigma": sigma, "p_lower": None, "p_upper": p_upper, "radius": radius})
    need(number == len(sigmas) or at_most(max(votes)) > 0.5 - TOLERANCE, "the last was passed")
    p_lower = clopper_pearson(votes[label], n, level) - tv
    radius = sigmas[number - 1] * quantile(p_lower) if p_lower > 0.5 else 0.0
    last = {"sigma": sigmas[number - 1], "p_lower": p_lower, "p_upper": None, "radius": radius}
    stages.append(last)
    least = min(stage["radius"] for stage in stages)
    need(least > 0, "the votes prove no radius")
    found = {"label": labels[label], "label_index": label, "p_lower": p_lower, "runner_up": None}
    return found | {"p_upper": None, "radius": least, "stages": stages}


def check_same(name: str, claimed: Any, proven: Any) -> None:
    """Refuse another value than the proven one, numbers but for TOLERANCE."""
    if isinstance(proven, dict) and isinstance(claimed, dict):
        need(claimed.keys() == proven.keys(), f"{name} has other fields")
        for key, value in proven.items():
            check_same(key, claimed[key], value)
    elif isinstance(proven, list) and isinstance(claimed, list):
        need(len(claimed) == len(proven), f"{name} has another length")
        for one, value in zip(claimed, proven, strict=True):
            check_same(name, one, value)
    else:
        close = is_a("number", claimed) and isinstance(proven, float)
        close = close and abs(claimed - proven) <= TOLERANCE * max(1, abs(proven))
        same = type(claimed) is type(proven) and claimed == proven  # True == 1.0 in Python.
        need(close or same, f"{name} = {claimed}: proven is {proven}")


def check(document: dict[str, Any]) -> None:
    """Refuse what does not follow from question and evidence."""
    question, result, subject = document["question"], document["result"], document["subject"]
    need(document["type"] == "urn:vouchsafe:certificate:1", "the type is another one")
    need(document["noise"]["format"] == "aes256-ctr/discrete-gaussian/3", "other noise")
    need(len(document["model"]["labels"]) <= 1000, "there are more than 1,000 labels")
    side = subject["preprocessing"]["resolution"]
    need(subject["shape"] == [3, side, side] and 1 <= side <= 4096, "shape is not [3, R, R]")
    check_question(question)
    values = 3 * side * side
    sigmas = question["sigma"] if isinstance(question["sigma"], list) else [question["sigma"]]
    tv = values * (5000 * sigmas[0] + 10) * 2.0**-62
    stated = document["evidence"]["total_variation"]
    need(abs(stated - tv) <= 1e-12 * tv, "total_variation is another one")
    found = prove(document, tv)
    levels = 255 * found["radius"]
    widths = [2**power for power in range(side.bit_length())]
    found["norms"] = {
        "l2_gray_levels": levels,
        "linf_gray_levels": levels / sqrt(values),
        "brightness_gray_levels": levels / sqrt(values),
        "patch_gray_levels": {str(width): levels / (width * sqrt(3)) for width in widths},
    }
    check_same("result", result, found)
    alpha, label, radius = map(canonical, (question["alpha"], result["label"], result["radius"]))
    what = "the classifier" if len(sigmas) == 1 else "the cascade of classifiers"
    meant = (
        f"With probability at least 1 - {alpha} over the noise, {what} smoothed with sigma "
        f"{', '.join(map(canonical, sigmas))} gives the label {label} to every "
        f"image at an l2 distance below {radius} from the subject, for pixels in [0, 1]; the label "
        "is stable, not proven correct."
    )
    need(document["statement"] == meant, "the statement is another one")


def main(certificate: str, jwks: str) -> int:
    """The exit status; prints the statement or the reason."""
    try:
        stated, keys = (parse(Path(file).read_bytes()) for file in (certificate, jwks))
        payload = signed_payload(stated["jws"], keys).decode()
        document = parse(payload)
        need(stated.keys() == {"document", "jws"}, "a certificate holds document and jws")
        need(canonical(document) == payload, "the payload is not canonical")
        need(canonical(stated["document"]) == payload, "document differs from the signed payload")
        check_form(document)
        published = keys.get("secret_commitments", [document["noise"]["secret_commitment"]])
        need(document["noise"]["secret_commitment"] in published, "another noise secret")
        model = document["model"]
        hashed = {"bundle": model["task_digest"], "numerics": model["numerics"]}
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()
        need(hashlib.sha256(text).hexdigest() == model["bundle"], "bundle is another hash")
        check(document)
    except Exception as error:  # What cannot be checked is refused.
        print(f"refused: {error!r}")
        return 1
    print(document["statement"])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
