"""Jobs, shards and their states: plain data, without torch, HTTP or a clock."""

from __future__ import annotations

import hashlib
import hmac
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

NOISE_FORMAT = "philox4x32-10/discrete-gaussian/2"
"""Part of every noise key: another way to draw or key rows gives other rows."""


class Mode(StrEnum):
    """The kind of a job; workers take PREDICT rows first."""

    CERTIFY = "certify"
    PREDICT = "predict"

    @property
    def priority(self) -> str:
        """`hi` for PREDICT, `lo` for CERTIFY."""
        return "hi" if self is Mode.PREDICT else "lo"

    @property
    def method(self) -> str:
        """The statistical procedure of the mode."""
        return "binomial" if self is Mode.PREDICT else "cohen"


class Domain(StrEnum):
    """The two independent families of noise rows, each indexed from 0."""

    SELECTION = "selection"
    ESTIMATION = "estimation"


class State(StrEnum):
    """The state of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self not in (State.QUEUED, State.RUNNING)


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows [start, stop) of one domain of a job: the unit of leasing, retrying and counting."""

    index: int
    domain: Domain
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of noise rows in the shard."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Job:
    """One question about one image.

    - `task_digest`: digest of the bundle that holds the task's labels.
    - `bundle`: digest of the same bundle together with the numerics.
    - `classes`: number of labels of the task.
    - `shape`, `pixels`: (3, H, W), channel first, and the uint8 bytes of an image of that shape.
    - `key`: the job's noise key (32 bytes).
    - `created`: Unix seconds.
    - `owner`: name of the caller's API key.
    - `traceparent`: W3C trace context of the request, for logs; no row or key depends on it.
    - `setup_rows`: a worker's cost to prepare the job, in rows.
    - `array_sha256`, `file_sha256`: SHA-256 (hex) of `pixels`, and of the file that was sent.
    - `numerics`: the worker's numerics that `bundle` includes.
    """

    id: str
    task: str
    task_digest: str
    bundle: str
    mode: Mode
    sigma: float
    alpha: float
    n0: int
    n: int
    classes: int
    shape: tuple[int, int, int]
    pixels: bytes
    key: bytes
    created: float
    owner: str | None = None
    traceparent: str | None = None
    setup_rows: int = 0
    array_sha256: str = ""
    file_sha256: str = ""
    numerics: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def rows(self) -> int:
        """Noise rows of the whole job: n0 + n, or n in predict mode (n0 is 0 there)."""
        return self.n0 + self.n

    @property
    def charge(self) -> int:
        """Rows that an open job adds to the backlog and to its owner's quota."""
        return self.rows + self.setup_rows

    def shards(self, most_rows: int) -> tuple[Shard, ...]:
        """The job's rows cut into shards of at most `most_rows` (>= 1), selection first."""
        cuts = [
            (domain, start, min(start + most_rows, rows))
            for domain, rows in ((Domain.SELECTION, self.n0), (Domain.ESTIMATION, self.n))
            for start in range(0, rows, most_rows)
        ]
        return tuple(Shard(index, *cut) for index, cut in enumerate(cuts))

    def domain_key(self, domain: Domain) -> bytes:
        """Noise key (32 bytes) of one domain of rows."""
        return hmac.digest(self.key, domain.encode(), "sha256")

    def encode(self) -> bytes:
        """UTF-8 JSON without the pixels, which travel apart; the key is in base64."""
        fields = asdict(self) | {"key": b64encode(self.key).decode()}
        del fields["pixels"]
        return canonical_json(fields)

    @classmethod
    def decode(cls, encoded: bytes, pixels: bytes) -> Job:
        """The job that `encode` wrote; fields with a default may be missing.

        Raises TypeError for unknown fields, and for other missing ones.
        """
        readers: dict[str, Callable[[Any], Any]] = {
            "key": b64decode,
            "mode": Mode,
            "shape": tuple,
        }
        fields = json.loads(encoded)
        for name in readers.keys() & fields.keys():
            fields[name] = readers[name](fields[name])
        return cls(**fields, pixels=pixels)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job's state and votes.

    `selection` and `estimation` are votes by class (K,), of `rows_done` rows together. Times are
    Unix seconds; `problem` is a problem document once the state is `failed`.
    """

    job: Job
    state: State
    rows_done: int
    selection: tuple[int, ...]
    estimation: tuple[int, ...]
    started: float | None = None
    finished: float | None = None
    problem: dict[str, Any] | None = None


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: the same value is always the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def question(job: Job) -> dict[str, Any]:
    """All that the rows of a job depend on except for the secret (design.md).

    The noise key and the certificate's id are made of it. Any other question has other rows.
    """
    return {
        "noise": NOISE_FORMAT,
        "pixels": job.array_sha256 or hashlib.sha256(job.pixels).hexdigest(),
        "shape": list(job.shape),
        "bundle": job.bundle,
        "mode": job.mode.value,
        "method": job.mode.method,
        "sigma": float(job.sigma),
        "alpha": float(job.alpha),
        "n0": job.n0,
        "n": job.n,
    }


def noise_key(secret: bytes, job: Job) -> bytes:
    """The noise key (32 bytes) of a job: HMAC-SHA256 of its question; `job.key` is not hashed.

    Every other question has other rows, so a caller may choose it after the response to this one.
    """
    return hmac.digest(secret, canonical_json(question(job)), "sha256")
