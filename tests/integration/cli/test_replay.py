"""service/cli/replay.py: every method's rows are drawn again, look by look."""

from __future__ import annotations

import copy
import hmac
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from models.noise import discrete_gaussian
from models.rows import Rows
from service.cli.replay import replay
from service.config import Settings
from service.jobs import Domain, JobStatus
from service.predictions.document import CertificateDocument
from service.predictions.verification import Refused
from tests.support.certificates import BUNDLE, answered, ended, issued
from tests.support.fakes import fake_label, fake_votes
from tests.support.serving import PNG, SECRET


class Labeler:
    """Networks that label a row by its key: nine of ten are for the third of four labels.

    Under noise of sigma 0.5 all labels are equally probable.
    """

    classes, batch_rows = 4, 16

    def votes(self, parts: Sequence[Rows]) -> NDArray[np.int64]:
        (part,) = parts
        if part.sigma == 0.5:
            return np.array([fake_votes(part.key, range(part.start, part.stop), 4)])
        labels = [fake_label(part.key, row, 20) for row in range(part.start, part.stop)]
        first, second = labels.count(0), labels.count(1)
        return np.array([[first, second, len(labels) - first - second, 0]])


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labeler in the place of loaded networks."""
    monkeypatch.setattr("service.cli.replay._model", lambda *_: Labeler())


def certified(method: str) -> JobStatus:
    """The status of a job of this method under the labeler."""
    status = answered(method)
    job, model = status.job, Labeler()

    def votes(domain: Domain, stop: int, start: int = 0, stage: int = 0) -> tuple[int, ...]:
        key = job.domain_key(domain, stage)
        rows = Rows(np.zeros(1, np.uint8), key, start, stop, job.sigmas[stage])
        return tuple(model.votes([rows])[0].tolist())

    if job.stages:
        passed = votes(Domain.ESTIMATION, job.n)
        answers = votes(Domain.ESTIMATION, 2 * job.n, job.n, 1)
        both = tuple(map(sum, zip(passed, answers, strict=True)))
        chosen = votes(Domain.SELECTION, 2 * job.n0, job.n0, 1)
        return ended(job, selection=chosen, estimation=both, looks=(passed,))
    ends = [sum(look) for look in (*status.looks, status.estimation)]
    *looks, last = [votes(Domain.ESTIMATION, end) for end in ends]
    return ended(
        job, selection=votes(Domain.SELECTION, job.n0), estimation=last, looks=tuple(looks)
    )


def again(document: dict[str, Any]) -> str:
    return replay(
        CertificateDocument.model_validate(document), PNG, BUNDLE, SECRET, Settings(data_dir=Path())
    )


@pytest.mark.parametrize("method", ["cohen", "two-sided", "anytime", "early", "cascade"])
def test_the_same_rows_get_the_same_votes(method: str) -> None:
    """As many rows as were drawn, no more, whether or not they ended early."""
    status = certified(method)
    told = again(issued(status)["document"])
    assert told == f"{10 + sum(status.estimation)} rows drawn again got the same votes"


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("cohen", "selection_counts"),
        ("two-sided", "estimation_counts"),
        ("early", "looks"),
        ("cascade", "selection_counts"),
        ("cascade", "estimation_counts"),
        ("cascade", "passed_counts"),
    ],
)
def test_other_votes_are_refused_by_name(method: str, field: str) -> None:
    """One vote that no row cast is found, also at a look before the last."""
    document = copy.deepcopy(issued(certified(method))["document"])
    votes = document["evidence"][field]
    if field == "looks":
        votes[0][1] -= 1
    else:
        votes = votes[0] if field == "passed_counts" else votes
        votes["2"] -= 1
        votes["3"] = votes.get("3", 0) + 1
    with pytest.raises(Refused, match=f"^{field} = .*: the replay counts "):
        again(document)


def test_looks_are_cut_where_rows_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is drawn twice, and none is left out."""
    drawn: list[tuple[int, int]] = []
    plain = Labeler.votes

    def noted(self: Labeler, parts: Sequence[Rows]) -> NDArray[np.int64]:
        drawn.append((parts[0].start, parts[0].stop))
        return plain(self, parts)

    status = certified("anytime")
    monkeypatch.setattr(Labeler, "votes", noted)
    again(issued(status)["document"])
    starts = [span for span in drawn if span[0] == 0]
    assert len(starts) == 2  # One for each domain.
    estimation = drawn[drawn.index(starts[1], 1) :]
    assert all(earlier[1] == later[0] for earlier, later in pairwise(estimation))
    assert estimation[-1][1] == 200


def documented_key(document: dict[str, Any]) -> bytes:
    """The job key, as docs/certificate.md makes it from a certificate and the secret."""
    question = document["question"]
    names = ("sigma", "alpha", "alpha_shares", "n0", "n", "target_radius", "method")
    hashed = {name: question[name] for name in names} | {
        "noise": document["noise"]["format"],
        "pixels": document["subject"]["array_sha256"],
        "shape": document["subject"]["shape"],
        "bundle": document["model"]["bundle"],
        "mode": "certify",
        "looks": question["looks"] or [],
    }
    if question["method"] == "cascade":
        hashed["looks"] = [question["n"] * stage for stage in range(1, len(question["sigma"]) + 1)]
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hmac.digest(SECRET, text.encode(), "sha256")


@pytest.mark.parametrize("method", ["cohen", "two-sided", "anytime", "early", "cascade"])
def test_keys_are_as_documented(method: str) -> None:
    """Who has the secret finds the key by the page alone."""
    status = certified(method)
    assert documented_key(issued(status)["document"]) == status.job.key


def test_rows_are_as_documented() -> None:
    """Row and pixel -> noise, by the page's four steps."""
    key, sigma = documented_key(issued()["document"]), 0.25
    cipher = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305
    context = mpmath.MPContext()
    context.dps = 50

    def below(i: int) -> Any:
        if i >= 0:
            return 2**63 - 1 - below(-1 - i)
        return context.floor(
            context.ldexp(context.ncdf((2 * i + 1) / (510 * context.mpf(sigma))), 63)
        )

    def word(row: int, pixel: int, half: int) -> int:
        counter = (row << 64) + (half << 32) + pixel // 4
        block = cipher.update(counter.to_bytes(16, "big"))
        return int.from_bytes(block[pixel % 4 * 4 :][:4], "little")

    noise = discrete_gaussian(key, 6, 8, (3, 2, 2), sigma).reshape(2, 12).tolist()
    for row, values in zip((6, 7), noise, strict=True):
        for pixel, value in enumerate(values):
            drawn = 2**31 * word(row, pixel, 0) + word(row, pixel, 1) // 2
            assert below(value - 1) < drawn < below(value)
