"""service/predictions/batches/store.py: folders that appear whole, and vanish with all of them."""

from __future__ import annotations

import json
import os
import time
from io import BytesIO
from pathlib import Path

import pytest

from service.config import Settings
from service.errors import Backlog, NotFound, QuotaExceeded
from service.jobs import State
from service.predictions.batches import store as stores
from service.predictions.batches.store import Batch, BatchStore

FIELDS = {"task": "default", "mode": "certify", "alpha": 0.0005}


def batch(name: str = "a", owner: str | None = None, created: float | None = None) -> Batch:
    seconds = time.time() if created is None else created
    return Batch(name.ljust(22, "-"), owner, seconds, 0.001, FIELDS, ["one.png", "two.png"])


def made(store: BatchStore, of: Batch) -> Batch:
    store.create(of, [BytesIO(b"one"), BytesIO(b"two")])
    return of


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return BatchStore(Settings(data_dir=tmp_path, retention_seconds=1000))


def line(index: int, **more: object) -> bytes:
    return json.dumps({"index": index, **more}).encode()


def test_what_is_stored_is_read_again(store: BatchStore, tmp_path: Path) -> None:
    """Another process reads the same batch and images, which only this user may read."""
    made(store, own := batch())
    other = BatchStore(Settings(data_dir=tmp_path))
    assert other.get(own.id) == own
    assert [other.image(own, index) for index in (0, 1)] == [b"one", b"two"]
    assert other.open() == [own]
    parent = tmp_path / "batches"
    for folder in (parent, parent / own.id, parent / own.id / own.run):
        assert folder.stat().st_mode & 0o777 == 0o700
    question = own.question(b"x")
    assert (question.alpha, question.image) == (0.0005, b"x")


def test_a_line_replaces_its_image(store: BatchStore) -> None:
    """The image goes with its line, and only a batch with every line ends."""
    own = made(store, batch())
    answer, bad = line(1, result={}), line(0, problem={"detail": "no image"})
    store.add_line(own, 1, answer)
    with pytest.raises(FileNotFoundError):
        store.image(own, 1)
    assert store.image(own, 0) == b"one"
    store.finish(own)
    assert (store.done(own), store.get(own.id).finished) == ({1}, None)
    store.add_line(own, 0, bad)
    assert ([*store.lines(own)], store.line(own, 1)) == ([bad, answer], answer)
    store.finish(own)
    ended = store.get(own.id)
    assert (ended.state, ended.problem) == (State.SUCCEEDED, None)
    assert ended.finished is not None
    assert store.open() == []


def test_a_batch_without_an_answer_fails(store: BatchStore) -> None:
    """Its problem is that of its first image."""
    own = made(store, batch())
    for index in (1, 0):
        store.add_line(own, index, line(index, problem={"detail": f"image {index}"}))
    store.finish(own)
    assert store.get(own.id).state is State.FAILED
    assert store.get(own.id).problem == {"detail": "image 0"}


def test_half_a_line_is_none(store: BatchStore, tmp_path: Path) -> None:
    """What a killed process had half written is no line, and no batch."""
    own = made(store, batch())
    (tmp_path / "batches" / own.id / own.run / "lines" / ".partial-x").write_bytes(b'{"ind')
    partial = tmp_path / "batches" / ".partial-x"
    partial.mkdir()
    assert (store.done(own), [*store.lines(own)]) == (set(), [])
    store.discard_old()
    assert partial.exists()
    os.utime(partial, (0, time.time() - stores.HALF_MADE_SECONDS - 1))
    store.discard_old()
    assert not partial.exists()
    assert store.open() == [own]


def test_a_discarded_batch_takes_nothing_more(store: BatchStore, tmp_path: Path) -> None:
    """Its jobs stay known until they are deleted; then nothing of it is left."""
    own = made(store, batch())
    store.add_job(own, "job-1")
    store.add_job(own, "job-2")
    store.discard(own.id)
    with pytest.raises(NotFound):
        store.get(own.id)
    with pytest.raises(FileNotFoundError):
        store.discard(own.id)
    refuses_changes(store, own)
    ((trash, jobs),) = store.discarded().items()
    assert jobs == ["job-1", "job-2"]
    store.erase(trash)
    assert [*(tmp_path / "batches").iterdir()] == []


def refuses_changes(store: BatchStore, discarded: Batch) -> None:
    for change in (
        lambda: store.image(discarded, 0),
        lambda: store.add_job(discarded, "job-3"),
        lambda: store.add_line(discarded, 0, b""),
        lambda: store.finish(discarded),
    ):
        with pytest.raises(FileNotFoundError):
            change()


def test_a_batch_of_the_same_id_is_another(store: BatchStore) -> None:
    """What a process still does for the discarded one neither reads nor changes the later one."""
    for later in (batch(), batch()):
        earlier = made(store, batch())
        store.add_job(earlier, "job-1")
        store.discard(earlier.id)
        made(store, later)
        refuses_changes(store, earlier)
        assert (store.get(later.id), store.done(later)) == (later, set())
        assert store.open() == [later]
        store.discard(later.id)
    assert sorted(store.discarded().values()) == [[], [], ["job-1"], ["job-1"]]


def test_batches_expire(store: BatchStore) -> None:
    """An open batch goes by its age, an ended one by the time since its end."""
    now = time.time()
    old, young, ended = batch("a", created=now - 1001), batch("b"), batch("c", created=now - 1001)
    for each in (old, young, ended):
        made(store, each)
    for index in (0, 1):
        store.add_line(ended, index, line(index, result={}))
    store.finish(ended)
    store.discard_old()
    assert {each.name.split("-")[1] for each in store.discarded()} == {"a"}
    assert store.get(young.id)
    assert store.get(ended.id)


def test_a_batch_that_cannot_be_read_stops_no_other(store: BatchStore, tmp_path: Path) -> None:
    """A file that another release wrote is no batch."""
    broken, whole = made(store, batch("a")), made(store, batch("b"))
    for text in ("{", '{"state": "other"}', '{"state": "queued", "more": 1}'):
        (tmp_path / "batches" / broken.id / broken.run / "batch.json").write_text(text)
        assert store.open() == [whole]
        with pytest.raises(NotFound):
            store.get(broken.id)


@pytest.mark.parametrize("name", ["..", "a/../b", "a" * 21, ".trash-a", ""])
def test_only_ids_lead_to_batches(store: BatchStore, name: str) -> None:
    """No other name reaches the disk."""
    with pytest.raises(NotFound):
        store.get(name)


def test_open_batches_are_bounded(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key may have half of all; ended ones do not count."""
    monkeypatch.setattr(stores, "MOST_OPEN", 4)
    first = made(store, batch("a", "ann"))
    made(store, batch("b", "ann"))
    with pytest.raises(QuotaExceeded, match="2 open batches; at most 2 may be"):
        made(store, batch("c", "ann"))
    made(store, batch("d", "bob"))
    made(store, batch("e", "bob"))
    with pytest.raises(Backlog, match="4 batches are open; at most 4 may be"):
        made(store, batch("f", "eve"))
    for index in (0, 1):
        store.add_line(first, index, line(index, result={}))
    store.finish(first)
    made(store, batch("f", "ann"))
