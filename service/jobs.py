"""Jobs, shards and their states: plain data, without torch, HTTP or a clock."""

from __future__ import annotations

import hashlib
import hmac
import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import chain, count, pairwise, zip_longest
from typing import Any

from models.certificates.alpha import alpha_shares, stage_shares
from models.demonstrations.limits import Demonstration

NOISE_FORMAT = "aes256-ctr/discrete-gaussian/3"
"""Part of every noise key: another way to draw or key rows gives other rows."""


class Mode(StrEnum):
    """The kind of a job; workers take PREDICT rows first. PURIFY certifies nothing."""

    CERTIFY = "certify"
    PREDICT = "predict"
    PURIFY = "purify"

    @property
    def priority(self) -> str:
        """`hi` for PREDICT, `lo` for the others."""
        return "hi" if self is Mode.PREDICT else "lo"


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
    - `mode`: that of a question, or the kind of a demonstration. A demonstration is a single shard
      of n estimation rows, under a random key; it has no method, no alpha and no certificate.
    - `key`: the job's noise key (32 bytes).
    - `created`: Unix seconds.
    - `owner`: name of the caller's API key.
    - `traceparent`: W3C trace context of the request, for logs; no row or key depends on it.
    - `setup_rows`: a worker's cost beside the rows, in rows: to prepare them, or the steps of
      purifications and of attacks.
    - `array_sha256`, `file_sha256`: SHA-256 (hex) of `pixels`, and of the file that was sent.
    - `numerics`: the worker's numerics that `bundle` includes.
    - `method`: the statistical procedure; unless given, `binomial` in predict mode, else `cohen`.
      In purify mode it is `majority`, of the n purifications that are then the job's rows.
    - `target_radius`: the radius that suffices the caller, in l2 on [0,1] pixels.
    - `looks`: the look schedule, in estimation rows drawn so far, ascending, the last equal to n.
      Each look ends a round. Empty where all rows are drawn before the only look.
    - `stages`: the sigmas of a cascade, descending; `sigma` is the first. `n0` and `n` are then the
      rows of each stage. Rows are numbered on from stage to stage, and a look ends each of them.
    - `epsilon`: the most that an attack may change, in l2 on [0,1] pixels.

    Raises ValueError for looks that are no such schedule.
    """

    id: str
    task: str
    task_digest: str
    bundle: str
    mode: Mode | Demonstration
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
    method: str = ""
    target_radius: float | None = None
    looks: tuple[int, ...] = ()
    stages: tuple[float, ...] = ()
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if not self.method and not self.demonstrates:
            method = "binomial" if self.mode is Mode.PREDICT else "cohen"
            object.__setattr__(self, "method", method)
        schedule, n = (0, *self.looks), self.n * len(self.sigmas)
        if self.looks and (schedule[-1] != n or any(a >= b for a, b in pairwise(schedule))):
            raise ValueError(f"looks is {self.looks}; it must ascend from 1 or more to n = {n}")

    @property
    def demonstrates(self) -> bool:
        """Whether the job is a demonstration."""
        return isinstance(self.mode, Demonstration)

    @property
    def rows(self) -> int:
        """Most noise rows: n0 + n a stage, or n in predict mode (n0 is 0 there)."""
        return (self.n0 + self.n) * len(self.sigmas)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise strength of each stage; only a cascade has several."""
        return self.stages or (self.sigma,)

    @property
    def alpha_shares(self) -> dict[str, float]:
        """The parts of alpha by what they are spent on; one in predict mode, none in purify."""
        if self.mode is Mode.PURIFY:
            return {}
        if self.stages:
            return stage_shares(self.alpha, len(self.stages))
        if self.mode is Mode.PREDICT:
            return {"label": self.alpha}
        return alpha_shares(self.method, self.alpha, self.target_radius is not None)

    @property
    def charge(self) -> int:
        """Rows that an open job adds to the backlog and to its owner's quota."""
        return self.rows + self.setup_rows

    def shards(self, most_rows: int) -> tuple[Shard, ...]:
        """The job's rows cut into shards of at most `most_rows` (>= 1), selection first."""
        return tuple(chain.from_iterable(self.rounds(most_rows)))

    def rounds(self, most_rows: int) -> tuple[tuple[Shard, ...], ...]:
        """The shards of each round; a single round without looks, a single shard to demonstrate.

        The first round has the selection rows too, or every round of a cascade those of its stage.
        Indices count on from round to round.
        """
        indices = count()
        most_rows = self.rows if self.demonstrates else most_rows

        def cut(domain: Domain, start: int, stop: int) -> list[Shard]:
            starts = range(start, stop, most_rows)
            return [Shard(next(indices), domain, at, min(at + most_rows, stop)) for at in starts]

        selection = pairwise(self.n0 * stage for stage in range(len(self.sigmas) + 1))
        estimation = pairwise((0, *(self.looks or (self.n,))))
        return tuple(
            (*cut(Domain.SELECTION, *chosen), *cut(Domain.ESTIMATION, *bounded))
            for chosen, bounded in zip_longest(selection, estimation, fillvalue=(0, 0))
        )

    def stage_of(self, shard: Shard) -> int:
        """The index of the stage whose rows the shard has; 0 unless the job is a cascade."""
        return shard.start // (self.n0 if shard.domain is Domain.SELECTION else self.n)

    def domain_key(self, domain: Domain, stage: int = 0) -> bytes:
        """Noise key (32 bytes) of one domain of rows, at one stage."""
        name = f"{domain}-{stage + 1}" if stage else domain
        return hmac.digest(self.key, name.encode(), "sha256")

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
            "mode": _mode,
            "shape": tuple,
            "looks": tuple,
            "stages": tuple,
        }
        fields = json.loads(encoded)
        for name in readers.keys() & fields.keys():
            fields[name] = readers[name](fields[name])
        return cls(**fields, pixels=pixels)


def _mode(name: str) -> Mode | Demonstration:
    return Demonstration(name) if name in [*Demonstration] else Mode(name)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job's state and votes.

    - `selection`, `estimation`: votes by class (K,), of `rows_done` rows together. After
      `Engine.finish` at an earlier look, `estimation` has the votes at that look. The `selection`
      of a cascade has the current stage's votes alone.
    - `looks`: estimation votes (K,) at each look before that of `estimation`, in order.
    - `due`: a round is complete, so the job waits for `Engine.extend` or `Engine.finish`.
    - `started`, `finished`: Unix seconds.
    - `problem`: a problem document once the state is `failed`.
    - `result`: what the shard of a demonstration was committed with.
    """

    job: Job
    state: State
    rows_done: int
    selection: tuple[int, ...]
    estimation: tuple[int, ...]
    started: float | None = None
    finished: float | None = None
    problem: dict[str, Any] | None = None
    looks: tuple[tuple[int, ...], ...] = ()
    due: bool = False
    result: bytes = b""

    @property
    def votes_by_stage(self) -> tuple[tuple[int, ...], ...]:
        """The estimation votes (K,) of each stage of a cascade that has begun."""
        looks = ((0,) * self.job.classes, *self.looks, self.estimation)
        return tuple(
            tuple(later - earlier for earlier, later in zip(*votes, strict=True))
            for votes in pairwise(looks)
        )


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
        "method": job.method,
        "sigma": list(job.stages) or float(job.sigma),
        "alpha": float(job.alpha),
        "alpha_shares": job.alpha_shares,
        "n0": job.n0,
        "n": job.n,
        "target_radius": None if job.target_radius is None else float(job.target_radius),
        "looks": list(job.looks),
    }


def noise_key(secret: bytes, job: Job) -> bytes:
    """The noise key (32 bytes) of a job: HMAC-SHA256 of its question; `job.key` is not hashed.

    Every other question has other rows, so a caller may choose it after the response to this one.
    """
    return hmac.digest(secret, canonical_json(question(job)), "sha256")
