"""Fakes of networks, clock and engine: exact, fast, and failing on demand."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.rows import Numerics, Rows
from service.engine.protocol import Engine
from service.jobs import Domain, Job, Mode
from service.worker.model import DigestChanged, warm_up

FAKE_NUMERICS = Numerics("fake", "none", 16, 1, "fake", "0")


class FakeClock:
    """Seconds that pass only by `advance`."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def fake_label(key: bytes, row: int, classes: int) -> int:
    """The label of one row: a pure function of its key and number."""
    return zlib.crc32(key + row.to_bytes(8, "big")) % classes


def fake_votes(key: bytes, rows: Iterable[int], classes: int) -> list[int]:
    """Votes by class of some rows."""
    votes = [0] * classes
    for row in rows:
        votes[fake_label(key, row, classes)] += 1
    return votes


def true_votes(job: Job, domain: Domain) -> tuple[int, ...]:
    """The exact votes of a whole domain of a job under FakeModel."""
    rows = job.n0 if domain is Domain.SELECTION else job.n
    return tuple(fake_votes(job.domain_key(domain), range(rows), job.classes))


@dataclass
class FakeModel:
    """A model without networks; `batches` are the requested (key, start, stop).

    Batches with a key of `poison` raise, all of them once `broken`. Each waits for `gate` and then
    takes `delay` seconds.
    """

    batch_rows: int = 16
    classes: int = 3
    digest: str = "bundle-a"
    numerics: Numerics = FAKE_NUMERICS
    is_available: bool = True
    is_loaded: bool = True
    delay: float = 0.0
    poison: Collection[bytes] = ()
    broken: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[list[tuple[bytes, int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def sample(self) -> Rows:
        return warm_up(2, 1, 1)[0]

    def padding(self, rows: int) -> int:
        return self.batch_rows - rows

    def votes(self, parts: Iterable[Rows], digest: str) -> NDArray[np.int64]:
        if digest != self.digest:
            raise DigestChanged(f"{digest} is requested and {self.digest} served")
        rows = [(part.key, part.start, part.stop) for part in parts]
        self.batches.append(rows)
        self.gate.wait()
        time.sleep(self.delay)
        if self.broken or any(key in self.poison for key, _, _ in rows):
            raise RuntimeError("the fake device says no")
        if sum(stop - start for _, start, stop in rows) > self.batch_rows:
            raise ValueError("more rows than a batch holds")
        votes = [fake_votes(key, range(start, stop), self.classes) for key, start, stop in rows]
        return np.array(votes, np.int64)

    def demonstrate(
        self, rows: Rows, epsilon: float | None, digest: str
    ) -> tuple[NDArray[np.int64], bytes]:
        most, self.batch_rows = self.batch_rows, rows.stop - rows.start
        try:
            (votes,) = self.votes([rows], digest)
        finally:
            self.batch_rows = most
        return votes, f"pictures within {epsilon}".encode()


class EngineSpy:
    """An engine that records its calls, and is unreachable whenever `trouble` returns true."""

    def __init__(self, engine: Engine, trouble: Callable[[], bool] = lambda: False) -> None:
        self.engine = engine
        self.trouble = trouble
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def asked(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of one method."""
        return [arguments for called, arguments in self.calls if called == name]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            if self.trouble():
                raise ConnectionError("the fake engine is out of reach")
            answer = await getattr(self.engine, name)(*arguments)
            if self.trouble():
                raise ConnectionError("the fake engine's answer was lost")
            return answer

        return call


def make_job(
    identity: str,
    *,
    task: str = "default",
    task_digest: str = "task-a",
    bundle: str = "bundle-a",
    mode: Mode = Mode.CERTIFY,
    n0: int = 10,
    n: int = 30,
    classes: int = 3,
    owner: str | None = None,
    created: float = 0.0,
) -> Job:
    """A small job on a 3x2x2 image; image and key are unique to `identity`."""
    return Job(
        id=identity,
        task=task,
        task_digest=task_digest,
        bundle=bundle,
        mode=mode,
        sigma=0.25,
        alpha=0.001,
        n0=0 if mode is Mode.PREDICT else n0,
        n=n,
        classes=classes,
        shape=(3, 2, 2),
        pixels=identity.encode().ljust(12, b"."),
        key=identity.encode().ljust(32, b"k"),
        created=created,
        owner=owner,
    )
