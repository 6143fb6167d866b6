"""service/jobs.py: shards, the wire format, and what the noise key depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.jobs import Domain, Job, Mode, State, canonical_json, noise_key
from tests.support.fakes import make_job
from tests.support.http import VALID

POSITIVE = st.floats(min_value=1e-6, max_value=1e6)
FIXED = st.builds(
    Job,
    id=st.text(),
    task=st.text(),
    task_digest=st.text(),
    bundle=st.text(),
    mode=st.sampled_from(Mode),
    sigma=POSITIVE,
    alpha=POSITIVE,
    n0=st.integers(0, 500),
    n=st.integers(0, 5000),
    classes=st.integers(1, 1000),
    shape=st.tuples(st.just(3), st.integers(1, 512), st.integers(1, 512)),
    pixels=st.binary(),
    key=st.binary(min_size=32, max_size=32),
    created=POSITIVE,
    owner=st.none() | st.text(),
    traceparent=st.none() | st.text(),
    setup_rows=st.integers(0, 1000),
    array_sha256=st.text(),
    file_sha256=st.text(),
    numerics=st.dictionaries(st.text(), st.none() | st.integers() | st.text()),
    method=st.sampled_from(["", "anytime", "two-sided"]),
    target_radius=st.none() | POSITIVE,
)


def scheduled(job: Job, looks: set[int]) -> Job:
    """The job with a look after some of these rows, and with the last one."""
    return replace(job, looks=(*sorted(look for look in looks if look < job.n), job.n))


IN_ROUNDS = st.builds(scheduled, FIXED.filter(lambda job: job.n > 0), st.sets(st.integers(1, 5000)))
CASCADES = st.builds(
    lambda job, sigmas: replace(
        job, stages=sigmas, looks=tuple(job.n * (stage + 1) for stage in range(len(sigmas)))
    ),
    FIXED.filter(lambda job: job.n0 > 0 and job.n > 0),
    st.lists(POSITIVE, min_size=2, max_size=4).map(tuple),
)
JOBS = FIXED | IN_ROUNDS | CASCADES
TRIAL = replace(make_job("trial"), pixels=bytes(12))
SECRET = b"s" * 32


@given(job=JOBS)
def test_decode_reads_what_encode_wrote(job: Job) -> None:
    """A job survives the wire, bytes, enums and tuples included."""
    assert Job.decode(job.encode(), job.pixels) == job


def test_encoding_is_utf8_json() -> None:
    """What travels can be read by anything, and is never a pickle."""
    assert json.loads(make_job("a").encode())["mode"] == "certify"


@pytest.mark.parametrize(
    ("mode", "method"), [(Mode.CERTIFY, "cohen"), (Mode.PREDICT, "binomial")], ids=str
)
def test_jobs_without_a_method_have_that_of_their_mode(mode: Mode, method: str) -> None:
    """A job made, or a record written, without method, target and looks draws all its rows."""
    job = make_job("a", mode=mode)
    assert (job.method, job.target_radius, job.looks) == (method, None, ())
    fields = json.loads(job.encode())
    for name in ("method", "target_radius", "looks"):
        del fields[name]
    assert Job.decode(canonical_json(fields), job.pixels) == job


@pytest.mark.parametrize("looks", [(10,), (10, 40), (10, 10, 30), (20, 10, 30), (0, 30)], ids=str)
def test_looks_must_ascend_to_n(looks: tuple[int, ...]) -> None:
    """A schedule that stands still, falls, begins with no rows, or does not end at n is refused."""
    with pytest.raises(ValueError, match=r"looks is \(.*ascend.* to n = 30"):
        replace(make_job("a"), looks=looks)


@pytest.mark.parametrize("name", ["id", "key", "shape", "mode", "n"])
def test_decode_refuses_missing_fields(name: str) -> None:
    """A message without a field is refused, not filled in."""
    fields = json.loads(make_job("a").encode())
    del fields[name]
    with pytest.raises(TypeError):
        Job.decode(canonical_json(fields), b"")


def test_records_of_before_traces_still_decode() -> None:
    """A record that was written without a trace context is a job that has none."""
    fields = json.loads(make_job("a").encode())
    del fields["traceparent"]
    assert Job.decode(canonical_json(fields), b"").traceparent is None


def test_rows_depend_on_no_trace() -> None:
    """The same question in another trace reads the same rows, and is cut alike."""
    job = make_job("a")
    other = replace(job, traceparent=VALID)
    assert [other.domain_key(domain) for domain in Domain] == [
        job.domain_key(domain) for domain in Domain
    ]
    assert other.shards(7) == job.shards(7)


def test_decode_refuses_unknown_fields() -> None:
    """A message with a field of another release is refused, not cut."""
    fields = json.loads(make_job("a").encode()) | {"surprise": 1}
    with pytest.raises(TypeError):
        Job.decode(canonical_json(fields), b"")


@given(job=JOBS, most_rows=st.integers(1, 700))
def test_shards_cover_every_row_once(job: Job, most_rows: int) -> None:
    """Each row of each domain lies in exactly one shard, and no shard is empty or too large."""
    shards = job.shards(most_rows)
    covered = [(s.domain, row) for s in shards for row in range(s.start, s.stop)]
    wanted = [
        (domain, row)
        for stage in range(len(job.sigmas))
        for domain, rows in ((Domain.SELECTION, job.n0), (Domain.ESTIMATION, job.n))
        for row in range(stage * rows, (stage + 1) * rows)
    ]
    assert covered == wanted
    assert len(wanted) == job.rows
    assert all(1 <= shard.rows <= most_rows for shard in shards)
    assert [shard.index for shard in shards] == list(range(len(shards)))


@given(job=IN_ROUNDS, most_rows=st.integers(1, 700))
def test_rounds_end_at_their_looks(job: Job, most_rows: int) -> None:
    """Each round has the estimation rows up to its look, the first all selection rows too."""
    rounds = job.rounds(most_rows)
    assert sum(shard.rows for shard in rounds[0]) == job.n0 + job.looks[0]
    assert [shards[-1].stop for shards in rounds] == list(job.looks)
    assert {shard.domain for shards in rounds[1:] for shard in shards} <= {Domain.ESTIMATION}
    assert sum(rounds, ()) == job.shards(most_rows)


def test_shards_of_rounds_are_a_known_answer() -> None:
    """No shard crosses a look, and a shard's index does not depend on the rounds after it."""
    job = replace(make_job("a", n0=12, n=40), looks=(16, 20, 40))
    assert [[(s.index, s.start, s.stop) for s in shards] for shards in job.rounds(10)] == [
        [(0, 0, 10), (1, 10, 12), (2, 0, 10), (3, 10, 16)],
        [(4, 16, 20)],
        [(5, 20, 30), (6, 30, 40)],
    ]
    (single,) = make_job("a").rounds(10)
    assert single == make_job("a").shards(10)


def test_stages_are_rounds_with_a_selection_each() -> None:
    """Rows are numbered on from stage to stage, and each shard lies in one stage."""
    job = replace(make_job("a", n0=5, n=16), stages=(0.5, 0.25), looks=(16, 32))
    assert [
        [(s.domain.value[0], s.start, s.stop) for s in shards] for shards in job.rounds(10)
    ] == [
        [("s", 0, 5), ("e", 0, 10), ("e", 10, 16)],
        [("s", 5, 10), ("e", 16, 26), ("e", 26, 32)],
    ]
    assert [[job.stage_of(s) for s in shards] for shards in job.rounds(10)] == [[0] * 3, [1] * 3]
    assert (job.rows, job.sigmas) == (42, (0.5, 0.25))
    with pytest.raises(ValueError, match=r"looks is \(16,\); .* to n = 32"):
        replace(job, looks=(16,))


def test_noise_key_is_a_known_answer() -> None:
    """The key of a fixed question never changes: certificates of older releases can be replayed."""
    # HMAC-SHA256 of the canonical JSON, computed with OpenSSL.
    known = "677f2bcd53cb699c0a426ce33f51951e04ede584c1ed94675635c706432550fa"
    assert noise_key(SECRET, TRIAL).hex() == known


@pytest.mark.parametrize(
    "other",
    [
        {"pixels": bytes(11) + b"\1"},
        {"shape": (3, 4, 1)},
        {"bundle": "c"},
        {"mode": Mode.PREDICT},
        {"sigma": 0.5},
        {"alpha": 0.0011},
        {"n0": 11},
        {"n": 31},
        {"method": "anytime"},
        {"target_radius": 0.25},
        {"looks": (16, 30)},
        {"looks": (30,)},
        {"stages": (0.25, 0.12)},
    ],
)
def test_any_other_question_has_rows_of_its_own(other: dict[str, Any]) -> None:
    """A question that differs in anything is a trial of its own, whatever was answered before."""
    assert noise_key(SECRET, replace(TRIAL, **other)) != noise_key(SECRET, TRIAL)


def test_another_secret_is_another_key() -> None:
    """Keys cannot be made without the secret."""
    assert noise_key(b"t" * 32, TRIAL) != noise_key(SECRET, TRIAL)


def test_the_same_question_has_the_same_key() -> None:
    """Caller, job, time and trace are no part of a question, and 1 is the sigma that 1.0 is."""
    again = replace(
        TRIAL, id="b", owner="ada", created=7.0, traceparent=VALID, key=b"x", task="renamed"
    )
    again = replace(again, file_sha256="another file of these pixels")
    assert noise_key(SECRET, again) == noise_key(SECRET, TRIAL)
    whole = replace(TRIAL, sigma=1)
    assert noise_key(SECRET, whole) == noise_key(SECRET, replace(TRIAL, sigma=1.0))


def test_a_key_can_be_made_of_the_pixels_hash() -> None:
    """Where pixels are not at hand their SHA-256 stands in."""
    sha256 = hashlib.sha256(TRIAL.pixels).hexdigest()
    ended = replace(TRIAL, pixels=b"", array_sha256=sha256)
    assert noise_key(SECRET, ended) == noise_key(SECRET, TRIAL)


@given(n0=st.integers(0, 500), n=st.integers(1, 5000), alpha=POSITIVE, mode=st.sampled_from(Mode))
def test_domain_keys_follow_from_the_key_alone(n0: int, n: int, alpha: float, mode: Mode) -> None:
    """All that a question's rows depend on is in its key."""
    job = make_job("a")
    other = replace(job, n0=n0, n=n, alpha=alpha, mode=mode)
    assert all(job.domain_key(domain) == other.domain_key(domain) for domain in Domain)


def test_domains_have_keys_of_their_own() -> None:
    """Selection, estimation and stages never read the same noise, nor the job's key itself."""
    job = make_job("a")
    keys = [job.key, *(job.domain_key(domain, i) for domain in Domain for i in range(4))]
    assert all(one != other for one, other in combinations(keys, 2))
    assert {len(key) for key in keys} == {32}


def test_predict_jobs_travel_in_the_fast_lane() -> None:
    """PREDICT is `hi` and CERTIFY is `lo`."""
    assert (Mode.PREDICT.priority, Mode.CERTIFY.priority) == ("hi", "lo")


def test_three_states_are_final() -> None:
    """Exactly succeeded, failed and cancelled are ends."""
    assert [s for s in State if s.ended] == [State.SUCCEEDED, State.FAILED, State.CANCELLED]
