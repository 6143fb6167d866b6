"""What a worker has in hand: leased shards by task and bundle, and since when."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from models.rows import Rows
from service.engine.protocol import Lease
from service.worker.batching import Packer, Slice
from service.worker.model import Model


@dataclass(slots=True, eq=False)
class Lot:
    """What is in hand of one task; `bundle` is the digest that its jobs are keyed with."""

    task: str
    bundle: str
    model: Model
    packer: Packer

    @property
    def is_served(self) -> bool:
        """Whether the model still has the digest, and is not refused."""
        return self.model.digest == self.bundle and not self.model.is_refused


class Holdings:
    """The leases of one worker, those of the batch being computed included.

    To compute some of them anew elsewhere might never end, so that they are `tied`: a shard of
    several batches once it is begun, and one of a failed batch, which is to be tried alone.
    """

    def __init__(self) -> None:
        self._lots: dict[tuple[str, str], Lot] = {}
        self._since: dict[str, float] = {}  # by token: when the lease began, or was renewed
        self._tied: set[str] = set()

    @property
    def rows(self) -> int:
        """Rows that are in no batch yet."""
        return sum(lot.packer.rows for lot in self._lots.values())

    @property
    def leases(self) -> list[Lease]:
        """Every lease in hand."""
        return [lease for lot in self._lots.values() for lease in lot.packer.leases]

    def add(self, lease: Lease, model: Model, since: float) -> None:
        """Take in a lease, held `since` so many seconds of `time.monotonic`, for this model, which
        may have come in another's place under the same digest."""
        key = (lease.job.task, lease.job.bundle)
        lot = self._lots.setdefault(key, Lot(*key, model, Packer(model.batch_rows)))
        lot.model = model
        lot.packer.add(lease)
        self._since[lease.token] = since

    def next_lot(self) -> Lot | None:
        """The lot whose turn it is: tasks in hand take turns, however fast one is topped up."""
        for key, lot in list(self._lots.items()):
            if not lot.packer.leases:
                del self._lots[key]
            elif lot.packer.rows:
                self._lots[key] = self._lots.pop(key)
                return lot
        return None

    @property
    def are_tied(self) -> bool:
        """Whether some lease in hand waits for this worker alone."""
        return any(lease.token in self._tied for lease in self.leases)

    def tie(self, leases: Iterable[Lease]) -> None:
        """These are not to be given away any more."""
        self._tied |= {lease.token for lease in leases}

    def give_away(self, besides: frozenset[str]) -> list[Lease]:
        """Let go of everything that is not tied, nor named by its token, and return it."""
        stay = besides | self._tied
        return self._let_go([lease for lease in self.leases if lease.token not in stay])

    def give_up(self, lot: Lot) -> list[Lease]:
        """Let go of all of a lot, tied or not, and return it."""
        return self._let_go(lot.packer.leases)

    def aged(self, seconds: float) -> list[Lease]:
        """The leases that began, or were renewed, so many seconds ago at least."""
        since = time.monotonic() - seconds
        return [lease for lease in self.leases if self._since[lease.token] <= since]

    def keep(self, leases: Sequence[Lease], held: Sequence[Lease]) -> bool:
        """Of these leases let go of all but those held, renewed now; True where that is none."""
        now, tokens = time.monotonic(), {lease.token for lease in held}
        for lease in leases:
            if lease.token in tokens:
                self._since[lease.token] = now
            else:
                self._drop(lease)
        self._since = {lease.token: self._since[lease.token] for lease in self.leases}
        self._tied &= self._since.keys()
        return len(tokens) == len(leases)

    def _let_go(self, leases: list[Lease]) -> list[Lease]:
        for lease in leases:
            self._drop(lease)
            del self._since[lease.token]
            self._tied.discard(lease.token)
        return leases

    def _drop(self, lease: Lease) -> None:
        if lot := self._lots.get((lease.job.task, lease.job.bundle)):
            lot.packer.drop(lease)


def leases_of(batch: Sequence[Slice]) -> list[Lease]:
    """The leases of a batch, each once."""
    return list({part.lease.token: part.lease for part in batch}.values())


def rows_of(part: Slice) -> Rows:
    """What a model is asked for a slice."""
    job = part.lease.job
    return Rows(
        pixels=np.frombuffer(job.pixels, np.uint8).reshape(job.shape),
        key=job.domain_key(part.lease.shard.domain),
        start=part.start,
        stop=part.stop,
        sigma=job.sigma,
    )
