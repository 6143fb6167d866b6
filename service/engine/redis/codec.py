"""What the engine reads of Redis, as the types of service.jobs and service.engine.protocol."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from service.engine.limits import Served
from service.engine.protocol import Lease, died_over
from service.errors import ShardDead
from service.jobs import Domain, Job, JobStatus, Shard, State, canonical_json

Fields = Mapping[bytes, bytes]
"""A hash as Redis gives it."""


def line_of(task: str, bundle: str) -> str:
    """The name of the streams that hold the shards of a task under a digest."""
    return f"{quote(task, safe='')}@{quote(bundle, safe='')}"


def caller_digest(owner: str | None, idempotency_key: str) -> str:
    """What stands for an owner's Idempotency-Key; the key itself is not stored."""
    return hashlib.sha256(canonical_json([owner, idempotency_key])).hexdigest()


def lost(what: str, job_id: str) -> dict[str, Any]:
    """The problem document of a job of which Redis lost a part."""
    return ShardDead(f"The {what} of the job got lost; ask again.", job=job_id).document()


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """A mapping from the list of names and values that a script returns."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def flat(shards: Iterable[Shard]) -> list[str | int]:
    """What the scripts are told of shards: index, domain, start, stop of each."""
    return [figure for s in shards for figure in (s.index, s.domain.value, s.start, s.stop)]


def named(leases: Iterable[Lease]) -> list[str | int]:
    """What names leases to the scripts: job, shard, token of each."""
    return [part for held in leases for part in (held.job.id, held.shard.index, held.token)]


def served(announcements: Sequence[tuple[bytes, int]]) -> Served:
    """How many workers serve each task and digest, from announcements and their makers."""
    found: Served = Counter()
    for text, makers in announcements:
        for item in json.loads(text)["bundles"].items():
            found[item] += makers
    return found


def numerics_of(announcements: Sequence[tuple[bytes, int]]) -> Iterator[Mapping[str, Any]]:
    """All numerics in the announcements of workers, repeats included."""
    for text, _ in announcements:
        yield from json.loads(text)["numerics"]


def lease_of(job: Job, taken: Sequence[Any]) -> Lease:
    """The lease of `job` that pull.lua returned."""
    _, index, domain, start, stop, isolated, token = taken
    shard = Shard(int(index), Domain(domain.decode()), int(start), int(stop))
    return Lease(job, shard, token.decode(), bool(isolated))


def shards_of(fields: Fields) -> tuple[Shard, ...]:
    """The shards that a job was cut into when it was queued, from its hash."""
    return Job.decode(fields[b"job"], b"").shards(int(fields[b"shard_rows"]))


def job_status(fields: Fields) -> JobStatus:
    """The status that a job's hash tells, of a job without pixels."""
    job = Job.decode(fields[b"job"], b"")
    state = State(fields[b"state"].decode())
    return JobStatus(
        job=job,
        state=state,
        rows_done=int(fields[b"rows_done"]),
        selection=_votes(job, Domain.SELECTION, fields),
        estimation=_votes(job, Domain.ESTIMATION, fields),
        started=_seconds(fields.get(b"started")),
        finished=_seconds(fields.get(b"finished")),
        problem=_problem(job, fields) if state is State.FAILED else None,
    )


def _votes(job: Job, domain: Domain, fields: Fields) -> tuple[int, ...]:
    return tuple(int(fields.get(f"{domain}:{k}".encode(), 0)) for k in range(job.classes))


def _seconds(text: bytes | None) -> float | None:
    return None if text is None else float(text)


def _problem(job: Job, fields: Fields) -> dict[str, Any]:
    """The problem reported; the deaths of workers, who report nothing, are told without one."""
    text = fields[b"problem"]
    problem: dict[str, Any] = json.loads(text) if text else died_over(job.id)
    return problem
