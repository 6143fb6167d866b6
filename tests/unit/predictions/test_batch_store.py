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


def made(store: BatchStore, of: Batch) -> str:
    store.create(of, [BytesIO(b"one"), BytesIO(b"two")])
    return of.id


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
    assert [other.image(own.id, index) for index in (0, 1)] == [b"one", b"two"]
    assert other.open() == [own]
    for folder in (tmp_path / "batches", tmp_path / "batches" / own.id):
        assert folder.stat().st_mode & 0o777 == 0o700
    question = own.question(b"x")
    assert (question.alpha, question.image) == (0.0005, b"x")


def test_a_line_replaces_its_image(store: BatchStore) -> None:
    """The image goes with its line, and only a batch with every line ends."""
    name = made(store, batch())
    store.add_line(name, 1, line(1, result={}))
    with pytest.raises(FileNotFoundError):
        store.image(name, 1)
    assert store.image(name, 0) == b"one"
    store.finish(name)
    assert (store.done(name), store.get(name).finished) == ({1}, None)
    store.add_line(name, 0, line(0, problem={"detail": "no image"}))
    assert [*store.lines(name)] == [0, 1]
    assert [*store.lines(name, {0})] == [1]
    store.finish(name)
    ended = store.get(name)
    assert (ended.state, ended.problem) == (State.SUCCEEDED, None)
    assert ended.finished is not None
    assert store.open() == []


def test_a_batch_without_an_answer_fails(store: BatchStore) -> None:
    """Its problem is that of its first image."""
    name = made(store, batch())
    for index in (1, 0):
        store.add_line(name, index, line(index, problem={"detail": f"image {index}"}))
    store.finish(name)
    assert store.get(name).state is State.FAILED
    assert store.get(name).problem == {"detail": "image 0"}


def test_half_a_line_is_none(store: BatchStore, tmp_path: Path) -> None:
    """What a killed process had half written is no line, and no batch."""
    name = made(store, batch())
    (tmp_path / "batches" / name / "lines" / ".partial-x").write_bytes(b'{"ind')
    partial = tmp_path / "batches" / ".partial-x"
    partial.mkdir()
    assert (store.done(name), store.lines(name)) == (set(), {})
    store.discard_old()
    assert partial.exists()
    os.utime(partial, (0, time.time() - stores.HALF_MADE_SECONDS - 1))
    store.discard_old()
    assert not partial.exists()
    assert [each.id for each in store.open()] == [name]


def test_a_discarded_batch_takes_nothing_more(store: BatchStore, tmp_path: Path) -> None:
    """Its jobs stay known until they are deleted; then nothing of it is left."""
    name = made(store, batch())
    store.add_job(name, "job-1")
    store.add_job(name, "job-2")
    store.discard(name)
    with pytest.raises(NotFound):
        store.get(name)
    for change in (
        lambda: store.add_job(name, "job-3"),
        lambda: store.add_line(name, 0, b""),
        lambda: store.discard(name),
    ):
        with pytest.raises(FileNotFoundError):
            change()
    ((trash, jobs),) = store.discarded().items()
    assert jobs == ["job-1", "job-2"]
    store.erase(trash)
    assert [*(tmp_path / "batches").iterdir()] == []


def test_batches_expire(store: BatchStore) -> None:
    """An open batch goes by its age, an ended one by the time since its end."""
    now = time.time()
    old, young, ended = batch("a", created=now - 1001), batch("b"), batch("c", created=now - 1001)
    for each in (old, young, ended):
        made(store, each)
    for index in (0, 1):
        store.add_line(ended.id, index, line(index, result={}))
    store.finish(ended.id)
    store.discard_old()
    assert {each.name.split("-")[1] for each in store.discarded()} == {"a"}
    assert store.get(young.id)
    assert store.get(ended.id)


def test_a_batch_that_cannot_be_read_stops_no_other(store: BatchStore, tmp_path: Path) -> None:
    """A file that another release wrote is no batch."""
    broken, whole = made(store, batch("a")), made(store, batch("b"))
    for text in ("{", '{"state": "other"}', '{"state": "queued", "more": 1}'):
        (tmp_path / "batches" / broken / "batch.json").write_text(text)
        assert [each.id for each in store.open()] == [whole]


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
