"""Questions at several sigma over HTTP: the first stage at which a label is probable answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from models.certificates.alpha import stage_shares
from models.certificates.cascade import Cascade, certify_cascade
from models.certificates.evidence import total_variation
from tests.support.serving import PNG, RESOLUTION, Service, nine_of_ten, problem, serving

BLUR = total_variation((3, RESOLUTION, RESOLUTION), 0.5)
ASKED = {"sigma": ["0.5", "0.25"], "n0": "20", "n": "200"}


def spread(rows: int) -> list[int]:
    """Votes: the four labels alike."""
    return [rows // 4, rows // 4, rows // 4, rows - rows // 4 * 3]


def close(rows: int) -> list[int]:
    """Votes: half of them, at most, for the cat."""
    return [rows // 4, rows // 4, rows // 2, rows - rows // 4 * 2 - rows // 2]


def nearly_spread(rows: int) -> list[int]:
    """Votes: two fifths for the cat."""
    return [rows // 5, rows // 5, rows - rows // 5 * 3, rows // 5]


def staged(rows: int, *stages: Callable[[int], list[int]]) -> Callable[[int], list[int]]:
    """Votes by the stage; `rows` is the number of rows of each."""
    drawn = 0

    def votes(shard_rows: int) -> list[int]:
        nonlocal drawn
        stage = stages[drawn // rows]
        drawn += shard_rows
        return stage(shard_rows)

    return votes


async def test_a_probable_label_at_the_first_sigma_is_the_answer() -> None:
    """No row of the second stage is drawn."""
    async with serving() as service:
        answer = (await service.ask(**ASKED)).json()
        assert (await service.engine.capacity()).backlog_rows == 0
    assert (answer["method"], answer["sigma"], answer["rows_used"]) == ("cascade", [0.5, 0.25], 220)
    assert (answer["label"], answer["certified"]) == ("cat", True)
    (stage,) = answer["stages"]
    assert (stage["sigma"], stage["outcome"], stage["p_upper"]) == (0.5, "answered", None)
    assert stage["counts"] == answer["counts"]
    assert stage["radius"] == answer["radius"] > 0.0
    assert answer["alpha_shares"] == stage_shares(0.001, 2)
    assert answer["looks"] == [200, 400]


async def test_where_no_label_is_probable_the_next_sigma_is_read() -> None:
    """The answer is the pure function's, names its stage, and its certificate verifies."""
    async with serving(votes=staged(220, spread, nine_of_ten)) as service:
        told = (await service.ask(**ASKED)).json()
        job = (await service.client.get(f"/jobs/{told['id']}")).json()
        (lease, *_) = service.voter.leases
        shards = {each.shard.index: each.shard for each in service.voter.leases}.values()
    question = Cascade((0.5, 0.25), 0.001, 20, 200, BLUR)
    ours = [shard for shard in shards if shard.domain == "estimation"]
    read = [
        [sum(votes) for votes in zip(*(vote(s.rows) for s in ours if of(s)), strict=True)]
        for vote, of in (
            (spread, lambda s: lease.job.stage_of(s) == 0),
            (nine_of_ten, lambda s: lease.job.stage_of(s) == 1),
        )
    ]
    proven = certify_cascade(question, nine_of_ten(20), read)
    assert (told["label"], told["radius"]) == ("cat", proven.radius)
    assert (told["rows_used"], job["result"]) == (440, told)
    assert [stage["outcome"] for stage in told["stages"]] == ["passed", "answered"]
    assert [stage["sigma"] for stage in told["stages"]] == [0.5, 0.25]
    assert [stage["radius"] for stage in told["stages"]] == [s.radius for s in proven.stages]
    assert told["p_lower"] == told["stages"][1]["p_lower"]
    assert told["radius"] == min(stage["radius"] for stage in told["stages"])
    assert told["certificate"]["document"]["question"]["sigma"] == [0.5, 0.25]


async def test_between_the_bounds_the_cascade_abstains() -> None:
    """It does not go on to the next sigma."""
    async with serving(votes=close) as service:
        answer = (await service.ask(**ASKED)).json()
    assert (answer["label"], answer["abstained"], answer["radius"]) == (None, True, 0.0)
    assert [stage["outcome"] for stage in answer["stages"]] == ["abstained"]
    assert answer["abstention"] == {"reason": "too_close", "rows_needed": None}
    assert "certificate" not in answer


async def test_an_abstention_names_the_rows_that_would_settle_its_stage() -> None:
    """A stage whose votes nearly prove that no label is probable is passed with more rows."""
    async with serving(votes=nearly_spread) as service:
        answer = (await service.ask(**ASKED)).json()
        reason, needed = answer["abstention"].values()
        more = -(-needed // 50) * 50  # Whole shards have the same shares of votes.
        again = (await service.ask(**{**ASKED, "n": str(more)})).json()
    assert (reason, answer["stages"][-1]["outcome"]) == ("too_few_rows", "abstained")
    assert 200 < needed < 1000
    assert [stage["outcome"] for stage in again["stages"]] == ["passed", "abstained"]
    assert again["abstention"] == {"reason": "too_close", "rows_needed": None}


async def test_json_and_forms_ask_the_same(service: Service) -> None:
    """A list in JSON is the repeated field of a form."""
    headers = {"Idempotency-Key": "once"}
    form = await service.ask(headers=headers, **ASKED)
    as_json = await service.ask_json(headers=headers, sigma=[0.5, 0.25], n0=20, n=200)
    assert as_json.json() == form.json()


async def test_a_batch_may_ask_a_cascade() -> None:
    """Each image's stages divide the image's share of alpha."""
    async with serving() as service:
        files = [("images", (f"{index}.png", PNG)) for index in range(2)]
        sent = await service.client.post("/batches", files=files, data=ASKED)
        text = (await service.client.get(f"{sent.headers['location']}/results")).text
    for line in map(json.loads, text.splitlines()):
        assert line["result"]["sigma"] == [0.5, 0.25]
        assert line["result"]["alpha_shares"] == stage_shares(0.0005, 2)


@pytest.mark.parametrize(
    ("fields", "field", "limit"),
    [
        ({"sigma": ["0.25", "0.5"]}, "sigma", None),
        ({"sigma": ["0.25", "0.25"]}, "sigma", None),
        ({"sigma": ["0.9", "0.8", "0.7", "0.6", "0.5"]}, "sigma", None),
        ({"sigma": ["0.5", "9"]}, "sigma", 4.0),
        ({"sigma": ["0.5", "0"]}, "sigma", 0.02),
        ({"sigma": ["3.9", "0.25"]}, "sigma", 1.0),
        ({"sigma": ["0.5", "high"]}, "sigma", None),
        ({"sigma": ["0.5", "0.25"], "target_radius": "0.1"}, "target_radius", None),
        ({"sigma": ["0.5", "0.25"], "mode": "predict"}, "method", None),
        ({"sigma": ["0.5", "0.25"], "method": "cohen"}, "method", None),
        ({"sigma": "0.5", "method": "cascade"}, "method", None),
        ({"sigma": ["0.5", "0.25"], "n": "11"}, "n", 12),
    ],
)
async def test_cascades_that_cannot_be_are_refused(
    service: Service, fields: dict[str, Any], field: str, limit: float | None
) -> None:
    """A 422 names the field, its value and, where there is one, the limit."""
    (error,) = problem(await service.ask(**fields), 422, "invalid-field")["errors"]
    assert (error["field"], error.get("limit")) == (field, limit)


async def test_json_cascades_that_cannot_be_are_refused(service: Service) -> None:
    """Another number than 2 to 4 is named, however many they are."""
    for sigmas in ([], [0.5], [0.5, 0.25] * 10_000):
        refused = problem(await service.ask_json(sigma=sigmas), 422, "invalid-field")
        (error,) = refused["errors"]
        assert error["field"] == "sigma"
        assert error["detail"] == f"sigma has {len(sigmas)} values: must be 2 to 4"
        assert len(json.dumps(refused)) < 1000
