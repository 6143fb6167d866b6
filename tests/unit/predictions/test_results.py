"""service/predictions/results.py: what votes become, and that a reader can recompute it."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import pytest

from service.jobs import JobStatus, Mode, State
from service.predictions.results import certificate, example, to_response
from service.predictions.schemas import PredictResponse
from tests.support.fakes import make_job
from tests.support.paths import ROOT
from tests.support.serving import serving

GUARANTEE = ROOT / "docs" / "guarantee.md"


def test_the_snippet_that_recomputes_an_answer_gives_its_digits() -> None:
    """The command in docs/guarantee.md prints the example's own bound and radius."""
    section = GUARANTEE.read_text().partition("## Check a radius yourself")[2]
    (snippet,) = re.findall(r'python -c "\n(.*?)"\n', section, re.DOTALL)
    printed = StringIO()
    with redirect_stdout(printed):
        exec("\n".join(line.strip() for line in snippet.splitlines()), {})  # noqa: S102
    told = example()
    assert printed.getvalue().split() == [repr(told.p_lower), repr(told.radius)]
    assert re.findall(r"It prints `([0-9.]+) ([0-9.]+)`", section) == [
        (repr(told.p_lower), repr(told.radius))
    ]


async def test_the_example_in_the_interface_is_an_answer() -> None:
    """/docs shows what the service would answer to these votes, with every field."""
    async with serving() as service:
        described = (await service.client.get("/openapi.json")).json()
    answered = described["paths"]["/predict"]["post"]["responses"]["200"]["content"]
    shown = answered["application/json"]["example"]
    assert PredictResponse.model_validate(shown).model_dump(mode="json") == shown
    assert PredictResponse.model_validate(shown) == example()
    assert "schema" in answered["application/json"]
    answered = described["paths"]["/certificates/{id}"]["get"]["responses"]["200"]["content"]
    assert answered["application/json"]["example"] == shown["certificate"]


@pytest.mark.parametrize("mode", Mode)
def test_the_method_that_is_answered_is_the_one_in_the_noise_key(mode: Mode) -> None:
    """A question's rows are keyed by the procedure that reads them."""
    job = make_job("a", mode=mode, n=100)
    status = JobStatus(job, State.SUCCEEDED, job.rows, (10, 0, 0), (100, 0, 0))
    assert certificate(status).method == job.method


def test_predict_abstains_by_the_noise_as_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's own bound on the noise enters the decision of PREDICT."""
    job = make_job("a", mode=Mode.PREDICT, n=100)
    status = JobStatus(job, State.SUCCEEDED, job.rows, (0, 0, 0), (70, 30, 0))
    labels = ("ant", "bee", "cat")
    assert to_response(status, labels).label == "ant"
    monkeypatch.setattr("service.predictions.results.total_variation", lambda *_: 9.5e-6)
    noisier = replace(status, job=replace(job, sigma=0.26))
    assert to_response(noisier, labels).abstained
