"""service/worker/batching.py: every row of every lease in exactly one slice, and full batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.engine.protocol import Lease
from service.jobs import Domain, Shard
from service.worker.batching import Packer, Slice
from tests.support.fakes import fake_votes, make_job

SHARDS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), max_size=12)


def lease(token: str, start: int = 0, rows: int = 10, *, isolated: bool = False) -> Lease:
    """A lease of a job of its own."""
    job = make_job(token, n=start + rows)
    return Lease(job, Shard(0, Domain.ESTIMATION, start, start + rows), token, isolated)


def leases_of(shards: Sequence[tuple[int, int]]) -> list[Lease]:
    return [lease(f"lease-{number}", *shard) for number, shard in enumerate(shards)]


def packed(batch_rows: int, leases: Sequence[Lease]) -> Packer:
    packer = Packer(batch_rows)
    for each in leases:
        packer.add(each)
    return packer


def drained(packer: Packer) -> list[list[Slice]]:
    return list(iter(packer.next_batch, []))


def votes_of(batch: Sequence[Slice]) -> NDArray[np.int64]:
    return np.array(
        [fake_votes(s.lease.job.key, range(s.start, s.stop), s.lease.job.classes) for s in batch]
    )


def rows_of(batches: Sequence[Sequence[Slice]]) -> Counter[tuple[str, int]]:
    return Counter(
        (part.lease.token, row)
        for batch in batches
        for part in batch
        for row in range(part.start, part.stop)
    )


@given(shards=SHARDS, batch_rows=st.integers(1, 64))
def test_every_row_is_in_exactly_one_slice(
    shards: Sequence[tuple[int, int]], batch_rows: int
) -> None:
    """All rows of all leases come out once, under their own numbers, and no others."""
    leases = leases_of(shards)
    wanted = Counter(
        (each.token, row) for each in leases for row in range(each.shard.start, each.shard.stop)
    )
    assert rows_of(drained(packed(batch_rows, leases))) == wanted


@given(shards=SHARDS, batch_rows=st.integers(1, 64))
def test_only_the_last_batch_is_short(shards: Sequence[tuple[int, int]], batch_rows: int) -> None:
    """Rows of many jobs fill every batch but the last to the brim."""
    batches = drained(packed(batch_rows, leases_of(shards)))
    sizes = [sum(part.rows for part in batch) for batch in batches]
    assert all(size == batch_rows for size in sizes[:-1])
    assert all(0 < size <= batch_rows for size in sizes)


@given(
    shards=SHARDS,
    batch_rows=st.integers(1, 64),
    mishaps=st.lists(st.sampled_from(["none", "back", "alone"]), max_size=30),
)
def test_counts_are_those_of_the_shard(
    shards: Sequence[tuple[int, int]], batch_rows: int, mishaps: list[str]
) -> None:
    """However rows are cut, put back and joined, each lease ends once with its own votes."""
    leases = leases_of(shards)
    packer = packed(batch_rows, leases)
    finished: list[tuple[str, list[int]]] = []
    while batch := packer.next_batch():
        mishap = mishaps.pop() if mishaps else "none"
        if mishap == "none":
            done = packer.absorb(batch, votes_of(batch))
            finished += [(each.token, counts.tolist()) for each, counts in done]
        else:
            packer.put_back(batch, alone=mishap == "alone")
    wanted = [
        (e.token, fake_votes(e.job.key, range(e.shard.start, e.shard.stop), e.job.classes))
        for e in leases
    ]
    assert sorted(finished) == sorted(wanted)
    assert packer.leases == []


@given(flags=st.lists(st.booleans(), max_size=10), batch_rows=st.integers(1, 40))
def test_isolated_leases_share_no_batch(flags: list[bool], batch_rows: int) -> None:
    """A batch with an isolated lease holds nothing else, and no row is lost over it."""
    leases = [lease(f"lease-{i}", isolated=flag) for i, flag in enumerate(flags)]
    batches = drained(packed(batch_rows, leases))
    for batch in batches:
        tokens = {part.lease.token for part in batch}
        assert len(tokens) == 1 or not any(part.lease.isolated for part in batch)
    assert sum(rows_of(batches).values()) == 10 * len(flags)


def test_leases_put_back_alone_are_kept_apart() -> None:
    """After a failed batch each of its leases is tried by itself, and newcomers wait."""
    packer = packed(16, [lease("one"), lease("two")])
    packer.put_back(packer.next_batch(), alone=True)
    packer.add(lease("three"))
    batches = [[part.lease.token for part in batch] for batch in drained(packer)]
    assert batches == [["one"], ["two"], ["three"]]


def test_dropped_leases_are_neither_packed_nor_counted() -> None:
    """The rows of a cancelled job leave at once, and its part of a batch under way is ignored."""
    gone, kept = lease("gone"), lease("kept")
    packer = packed(12, [gone, kept])
    batch = packer.next_batch()
    packer.drop(gone)
    assert packer.absorb(batch, votes_of(batch)) == []
    assert rows_of(drained(packer)) == Counter({("kept", row): 1 for row in range(2, 10)})


def test_rows_are_those_in_no_batch() -> None:
    """`rows` says how many more rows could be taken at once."""
    packer = packed(4, [lease("one"), lease("two")])
    packer.next_batch()
    assert (packer.rows, len(packer.leases)) == (16, 2)


def test_a_lease_is_taken_in_once() -> None:
    """Two leases of one token would share their votes: the second is refused."""
    packer = packed(8, [lease("same")])
    with pytest.raises(ValueError, match="in flight already"):
        packer.add(lease("same", rows=20))
    assert [part.lease.shard.rows for part in packer.next_batch()] == [10]


@pytest.mark.parametrize("votes", [[[5, 0, 0]], [[5, 0], [5, 0]]], ids=str)
def test_votes_of_another_shape_count_nothing(votes: list[list[int]]) -> None:
    """A batch of which some could be counted is not, so that it can be put back whole."""
    first, second = lease("first", rows=5), lease("second", rows=5)
    packer = packed(10, [first, second])
    batch = packer.next_batch()
    with pytest.raises(ValueError, match="votes of shape"):
        packer.absorb(batch, np.array(votes))
    packer.put_back(batch)
    assert packer.next_batch() == batch
    finished = packer.absorb(batch, votes_of(batch))
    assert [(one.token, counts.sum()) for one, counts in finished] == [("first", 5), ("second", 5)]


def test_one_job_of_other_classes_keeps_all_from_being_counted() -> None:
    """Its votes cannot be told from the others', whose leases stay in hand."""
    jobs = [make_job("first", n=5), make_job("second", n=5, classes=4)]
    leases = [Lease(job, Shard(0, Domain.ESTIMATION, 0, 5), job.id) for job in jobs]
    packer = packed(10, leases)
    with pytest.raises(ValueError, match="votes of shape"):
        packer.absorb(packer.next_batch(), np.array([[5, 0, 0]] * 2))
    assert packer.leases == leases
