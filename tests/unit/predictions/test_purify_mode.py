"""`mode=purify`: a label of most purifications, never certified, charged by its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.engine.protocol import Lease
from service.jobs import Domain, Mode, Shard
from service.predictions import checks
from service.predictions.question import PURIFICATION_ROWS, PredictRequest
from service.worker.batching import Packer
from service.worker.in_flight import rows_of
from tests.support.fakes import make_job
from tests.support.serving import PNG, problem, serving


@pytest.fixture
def _diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake denoiser has steps."""
    monkeypatch.setattr(checks, "DIFFUSION_KINDS", ("fake-denoiser",))


@pytest.mark.usefixtures("_diffusion")
async def test_an_answer_is_the_majority_and_certifies_nothing() -> None:
    """No radius, no bound, no certificate, whatever the votes; workers are told to purify."""
    async with serving(votes=lambda rows: [1, rows - 1, 0, 0]) as service:
        answer = (await service.ask(mode="purify")).json()
        (lease, *_) = service.voter.leases
    assert (answer["mode"], answer["method"]) == ("purify", "majority")
    assert answer["label_index"] == 1
    assert (answer["certified"], answer["radius"], answer["p_lower"]) == (False, None, None)
    assert (answer["abstained"], answer["attack_norms"]) == (False, None)
    assert "certificate" not in answer
    assert (answer["n"], answer["n0"], answer["rows_used"], answer["sigma"]) == (8, 0, 8, 0.121)
    assert answer["alpha_shares"] == {}
    job, shard = lease.job, lease.shard
    packer = Packer(batch_rows=16)
    packer.add(lease)
    (part,) = packer.next_batch()
    assert rows_of(part).purified
    assert (shard.domain, job.mode, job.charge) == (Domain.ESTIMATION, Mode.PURIFY, 8 * 150)


@pytest.mark.usefixtures("_diffusion")
@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"n": 17}, "n", "n = 17: mode purify takes at most 16 purifications"),
        ({"method": "two-sided"}, "method", "mode purify has majority"),
        ({"target_radius": 0.1}, "target_radius", "only the method anytime has a target"),
        ({"sigma": [0.5, 0.25]}, "method", "several sigma need cascade"),
        ({"sigma": 1.5}, "sigma", "supports at most 1"),
    ],
)
async def test_what_has_no_answer_is_refused(
    fields: dict[str, Any], field: str, words: str
) -> None:
    """By the field, its value and its limit."""
    async with serving() as service:
        document = problem(await service.ask(mode="purify", **fields), 422, "invalid-field")
    assert words in document["detail"]
    assert document["errors"][0]["field"] == field


async def test_a_task_without_a_diffusion_model_is_refused() -> None:
    """Its kind is named; and the other modes have no majority."""
    async with serving() as service:
        document = problem(await service.ask(mode="purify"), 422, "invalid-field")
        assert "has a denoiser of kind fake-denoiser; a purification needs" in document["detail"]
        other = problem(await service.ask(method="majority"), 422, "invalid-field")
        assert "mode certify has two-sided, anytime, cohen, cascade" in other["detail"]


@pytest.mark.usefixtures("_diffusion")
async def test_the_steps_are_charged() -> None:
    """A question above the limit is refused with its rows, and nothing else changes."""
    question = PredictRequest.model_validate({"image": PNG, "mode": "purify", "n": 10})
    assert (question.rows, question.charge) == (10, 10 * PURIFICATION_ROWS)
    assert PredictRequest.model_validate({"image": PNG}).charge == 1100
    async with serving(backlog_rows=1_000) as service:
        document = problem(await service.ask(mode="purify"), 422, "invalid-field")
    assert "n = 8 makes 1200 rows" in document["detail"]


def test_purifications_share_no_batch() -> None:
    """They take as long as hundreds of rows; other leases are packed as ever."""
    leases = [
        Lease(make_job(str(i), mode=mode), Shard(0, Domain.ESTIMATION, 0, 2), str(i))
        for i, mode in enumerate((Mode.PREDICT, Mode.PURIFY, Mode.PURIFY, Mode.PREDICT))
    ]
    packer, batches = Packer(batch_rows=16), []
    for lease in leases:
        packer.add(lease)
    while batch := packer.next_batch():
        batches.append([part.lease.token for part in batch])
        packer.absorb(batch, np.ones((len(batch), batch[0].lease.job.classes), np.int64))
    assert sorted(map(sorted, batches)) == [["0", "3"], ["1"], ["2"]]
