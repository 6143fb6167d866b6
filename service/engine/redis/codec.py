"""Converts between Redis replies and the types of service.jobs and service.engine.protocol."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from service.engine.limits import (
    Served,
    another_request,
    full,
    over_quota,
    too_large,
    unserved,
)
from service.engine.options import EngineOptions
from service.engine.protocol import (
    FAILURES_ALLOWED,
    ISOLATED_CRASHES_ALLOWED,
    Lease,
    died_over,
    rows_per_second,
)
from service.engine.scheduling import FAST_PULLS
from service.errors import Problem, ShardDead
from service.jobs import Domain, Job, JobStatus, Shard, State, canonical_json

Fields = Mapping[bytes, bytes]
"""A hash as Redis returns it."""

_DEAD_LETTERS = 1_000
_GRACE_SECONDS = 60.0
"""Seconds that keys of open jobs outlive the retention: a sweep corrects the backlog first."""


def script_terms(options: EngineOptions, sweep_seconds: float) -> dict[str, int | None]:
    """The settings that every script gets."""
    return {
        "shard_rows": options.shard_rows,
        "lease_ms": _milliseconds(options.lease_seconds),
        "sweep_ms": _milliseconds(sweep_seconds),
        "silence_ms": _milliseconds(options.worker_seconds),
        "max_queue_rows": options.max_queue_rows,
        "max_queue_rows_per_key": options.max_queue_rows_per_key,
        "retention_ms": _milliseconds(options.retention_seconds),
        "open_ms": _milliseconds(options.retention_seconds + _GRACE_SECONDS),
        "max_finished_jobs": options.max_finished_jobs,
        "max_results": options.max_results,
        "fast_pulls": FAST_PULLS,
        "unserved_ms": _milliseconds(options.unserved_seconds),
        "failures_allowed": FAILURES_ALLOWED,
        "deaths_allowed": ISOLATED_CRASHES_ALLOWED,
        "dead_letters": _DEAD_LETTERS,
    }


def line_of(task: str, bundle: str) -> str:
    """The last part of the streams' keys that hold the shards of a task under a digest."""
    return f"{quote(task, safe='')}@{quote(bundle, safe='')}"


def caller_digest(owner: str | None, idempotency_key: str) -> str:
    """The SHA-256 (hex) that is stored in place of an owner's Idempotency-Key."""
    return hashlib.sha256(canonical_json([owner, idempotency_key])).hexdigest()


def lost(part: str, job_id: str) -> dict[str, Any]:
    """The problem document of a job of which Redis lost `part`."""
    return ShardDead(f"The {part} of the job got lost; ask again.", job=job_id).document()


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """A mapping from the list of names and values that a script returns."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def flat(shards: Iterable[Shard]) -> list[str | int]:
    """Shards as the scripts' arguments: index, domain, start, stop of each."""
    return [figure for s in shards for figure in (s.index, s.domain.value, s.start, s.stop)]


def named(leases: Iterable[Lease]) -> list[str | int]:
    """Leases as the scripts' arguments: job, shard, token of each."""
    return [part for lease in leases for part in (lease.job.id, lease.shard.index, lease.token)]


def rejection(job: Job, limit: int, outcome: bytes, figures: Sequence[bytes]) -> Problem | None:
    """The problem of a job in a reply of submit.lua; None where the job is queued or known.

    `limit` is the most rows of one job.
    """
    match outcome, figures:
        case b"mismatch", _:
            return another_request()
        case b"large", _:
            return too_large(job, limit)
        case b"unserved", _:
            return unserved(job.task)
        case b"quota", (of_owner, quota, rows, seconds):
            speed = rows_per_second(int(rows), float(seconds))
            return over_quota(job.charge, int(of_owner), int(quota), speed)
        case b"full", (waiting, rows, seconds):
            return full(job.charge, int(waiting), rows_per_second(int(rows), float(seconds)))
    return None


def served(announcements: Sequence[tuple[bytes, int]]) -> Served:
    """Number of workers by task and digest.

    `announcements` are pairs of an announcement (JSON) and its number of workers.
    """
    found: Served = Counter()
    for text, workers in announcements:
        for item in json.loads(text)["bundles"].items():
            found[item] += workers
    return found


def numerics_of(announcements: Sequence[tuple[bytes, int]]) -> Iterator[Mapping[str, Any]]:
    """All numerics in the announcements of workers, repeats included."""
    for text, _ in announcements:
        yield from json.loads(text)["numerics"]


def lease_of(job: Job, taken: Sequence[Any]) -> Lease:
    """The lease of `job` in a reply of pull.lua."""
    _, index, domain, start, stop, isolated, token = taken
    shard = Shard(int(index), Domain(domain.decode()), int(start), int(stop))
    return Lease(job, shard, token.decode(), bool(isolated))


def shards_of(fields: Fields) -> tuple[Shard, ...]:
    """The shards of a job's rounds so far as they were cut at submission, from its hash."""
    shards = Job.decode(fields[b"job"], b"").shards(int(fields[b"shard_rows"]))
    return shards[: int(fields[b"shards"])]


def job_status(fields: Fields) -> JobStatus:
    """The status in a job's hash; its job has no pixels."""
    job = Job.decode(fields[b"job"], b"")
    state = State(fields[b"state"].decode())
    looks = {at: _votes_at(job, at, fields) for at in job.looks if b"look:%d" % at in fields}
    # Only a job that was finished at an earlier look has stored votes of its last one.
    estimation = looks.pop(int(fields.get(b"look", 0)), None)
    return JobStatus(
        job=job,
        state=state,
        rows_done=int(fields[b"rows_done"]),
        selection=_votes(job, Domain.SELECTION, fields),
        estimation=estimation or _votes(job, Domain.ESTIMATION, fields),
        started=_seconds(fields.get(b"started")),
        finished=_seconds(fields.get(b"finished")),
        problem=_problem(job, fields) if state is State.FAILED else None,
        looks=tuple(looks.values()),
        result=fields.get(b"result", b""),
        due=b"look" in fields and not state.ended and fields[b"counted"] == fields[b"shards"],
    )


def _votes(job: Job, domain: Domain, fields: Fields) -> tuple[int, ...]:
    return tuple(int(fields.get(f"{domain}:{k}".encode(), 0)) for k in range(job.classes))


def _votes_at(job: Job, look: int, fields: Fields) -> tuple[int, ...]:
    votes = json.loads(fields[b"look:%d" % look])
    return tuple(votes.get(str(k), 0) for k in range(job.classes))


def _seconds(text: bytes | None) -> float | None:
    return None if text is None else float(text)


def _problem(job: Job, fields: Fields) -> dict[str, Any]:
    """The reported problem; after worker crashes the field is empty, and `died_over` stands in."""
    text = fields[b"problem"]
    problem: dict[str, Any] = json.loads(text) if text else died_over(job.id)
    return problem


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
