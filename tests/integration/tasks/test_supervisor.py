from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from models.adaptation.plan import STATUS, Status, locked
from models.bundle import read_bundle
from service.tasks import process
from service.tasks.process import LOG, LOG_BYTES, Run
from service.tasks.repository import is_running
from service.tasks.store import Store
from tests.support.adapting import (
    FAKE,
    FAST,
    create,
    is_alive,
    make_store,
    starts,
    supervising,
    until,
    wait_until,
)
from tests.support.fake_adaptation import GO, works
from tests.support.fakes import FakeClock
from tests.support.metrics import counted


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path)


def state(store: Store, task_id: str) -> str:
    """The task's state, or an empty string where there is none."""
    task = store.find(task_id)
    if task is not None and task.status.state == "ready":
        return Status.read(store.jobs / task_id).state  # Its process may be about to say so.
    return task.status.state if task else ""


async def test_jobs_run_one_after_another(store: Store) -> None:
    """Queued jobs run in the order they were made, one at a time, until each is published."""
    before = counted("vouchsafe_adaptations_total", outcome="ready")
    seconds = counted("vouchsafe_adaptation_seconds_count")
    tasks = [create(store, seed=seed) for seed in range(3)]
    async with supervising(store):
        await until(lambda: all(state(store, task.id) == "ready" for task in tasks))
    found = [store.get(task.id).status for task in tasks]
    spans = [(status.started or 0, status.finished or 0) for status in found]
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    assert [len(starts(store, task)) for task in tasks] == [1, 1, 1]
    assert read_bundle(store.tasks / tasks[0].id).labels == tasks[0].labels
    assert counted("vouchsafe_adaptations_total", outcome="ready") == before + 3
    assert counted("vouchsafe_adaptation_seconds_count") == seconds + 3


async def test_jobs_made_later_are_found(store: Store) -> None:
    """A job that another process makes while the supervisor runs is run too."""
    async with supervising(store):
        await asyncio.sleep(0.1)
        task = create(make_store(store.jobs.parent))
        await until(lambda: state(store, task.id) == "ready")


async def test_a_process_that_died_is_started_again(store: Store) -> None:
    """A process killed once is started again, and the job ends well."""
    task = create(store, "once")
    async with supervising(store):
        await until(lambda: state(store, task.id) == "ready")
    assert len(starts(store, task)) == 2


async def test_a_process_that_gets_further_each_time_is_started_again(store: Store) -> None:
    """Deaths that come with progress are not held against the job, however many."""
    task = create(store, "crawl")
    async with supervising(store):
        await until(lambda: state(store, task.id) == "ready")
    assert len(starts(store, task)) == 4


async def test_a_process_that_dies_again_and_again_fails_its_job(store: Store) -> None:
    """After three starts in vain the job has failed, says how it died, and others go on."""
    before = counted("vouchsafe_adaptations_total", outcome="failed")
    poison, other = create(store, "die"), create(store)
    async with supervising(store):
        await until(lambda: state(store, other.id) == "ready")
    status = store.get(poison.id).status
    assert (status.state, len(starts(store, poison))) == ("failed", 4)
    assert status.problem is not None
    assert status.problem["kind"] == "died"
    assert "signal 9" in status.problem["detail"]
    assert status.finished is not None
    assert (store.jobs / poison.id / LOG).read_text().count("dying now") == 4
    assert counted("vouchsafe_adaptations_total", outcome="failed") == before + 1


async def test_a_failure_is_the_process_own_word(store: Store) -> None:
    """A job that ends with a problem is not run again until it is asked for once more."""
    task = create(store, "fail")
    async with supervising(store):
        await until(lambda: state(store, task.id) == "failed")
        await asyncio.sleep(0.2)
        assert len(starts(store, task)) == 1
        create(store, "fail")
        await until(lambda: len(starts(store, task)) == 2)
        await until(lambda: state(store, task.id) == "failed")
    problem = store.get(task.id).status.problem
    assert problem is not None
    assert problem["kind"] == "diverged"


async def test_killed_in_the_middle_it_goes_on(store: Store) -> None:
    """kill -9 of the process in the middle of a stage costs nothing but a new start."""
    task = create(store, "wait")
    async with supervising(store):
        await until(lambda: store.get(task.id).status.stage == "finetuning")
        os.kill(starts(store, task)[0], signal.SIGKILL)
        await until(lambda: len(starts(store, task)) == 2)
        (store.jobs / task.id / GO).touch()
        await until(lambda: state(store, task.id) == "ready")


def test_a_process_without_news_is_ended(store: Store) -> None:
    """A process that hangs is ended and counts as one that died."""
    task, clock = create(store, "hang"), FakeClock()
    run = Run(store.jobs / task.id, store.tasks, FAKE, FAST, clock)

    def hangs(times: int) -> bool:
        clock.advance(FAST.restart)
        run.step()
        return len(starts(store, task)) == times and store.get(task.id).status.progress == 0.5

    def is_ended() -> bool:
        clock.advance(FAST.news + 1)  # At each look, for the last news may be seen late.
        run.step()
        return not works(starts(store, task)[-1])

    try:
        for times in range(1, 5):
            wait_until(partial(hangs, times))
            wait_until(is_ended)
        wait_until(run.step)
    finally:
        run.stop()
    assert state(store, task.id) == "failed"
    assert len(starts(store, task)) == 4
    assert not any(is_alive(process) for process in starts(store, task))


async def test_told_to_stop_it_leaves_the_job_for_later(store: Store) -> None:
    """At its stop the process is gone and the job queued; the next supervisor goes on with it."""
    task = create(store, "wait")
    async with supervising(store) as stop:
        await until(lambda: store.get(task.id).status.stage == "finetuning")
        await until(lambda: 0 < counted("vouchsafe_adaptation_progress") < 1)
        stop.set()
    assert not is_alive(starts(store, task)[0])
    assert state(store, task.id) == "queued"
    assert store.get(task.id).status.progress == 0.5
    (store.jobs / task.id / GO).touch()
    async with supervising(store):
        await until(lambda: state(store, task.id) == "ready")
    assert len(starts(store, task)) == 2


async def test_removed_while_it_runs(store: Store) -> None:
    """Removing a running job ends its process and leaves nothing; the next job goes on."""
    before = counted("vouchsafe_adaptations_total", outcome="cancelled")
    task, other = create(store, "hang"), create(store)
    async with supervising(store):
        await until(lambda: store.get(task.id).status.stage == "finetuning")
        process = starts(store, task)[0]
        await asyncio.to_thread(make_store(store.jobs.parent).delete, task.id)
        assert not is_alive(process)
        await until(lambda: state(store, other.id) == "ready")
    assert store.find(task.id) is None
    assert {path.name for path in store.jobs.iterdir()} == {".lock", other.id}
    assert counted("vouchsafe_adaptations_total", outcome="cancelled") == before + 1


async def test_two_supervisors_share_the_jobs(store: Store) -> None:
    """Two processes over one folder never run the same job at the same time, nor twice."""
    tasks = [create(store, seed=seed) for seed in range(4)]
    async with supervising(store), supervising(make_store(store.jobs.parent)):
        await until(lambda: all(state(store, task.id) == "ready" for task in tasks))
    assert [len(set(starts(store, task))) for task in tasks] == [1, 1, 1, 1]


async def test_a_job_that_another_process_looks_after_is_let_be(store: Store) -> None:
    """A job claimed elsewhere is passed over for the next one, then taken up."""
    held, other = create(store), create(store, seed=1)
    elsewhere = Run(store.jobs / held.id, store.tasks, ("sleep", "60"), FAST)
    elsewhere.step()
    assert elsewhere.is_mine
    async with supervising(store):
        await until(lambda: state(store, other.id) == "ready")
        assert starts(store, held) == []
        elsewhere.stop()
        await until(lambda: state(store, held.id) == "ready")


async def test_a_process_left_over_is_waited_for(store: Store) -> None:
    """While the process of a killed server still holds the job's lock no other is started."""
    task = create(store)
    async with supervising(store):
        with locked(store.jobs / task.id):
            await asyncio.sleep(0.2)
            assert starts(store, task) == []
        await until(lambda: state(store, task.id) == "ready")
    assert len(starts(store, task)) == 1


async def test_trouble_with_the_disk_is_waited_out(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the disk is logged and ends no supervisor; jobs go on once it is over."""
    task, sweep, failures = create(store), store.sweep, [1, 2]

    def troubled() -> None:
        if failures:
            raise OSError(failures.pop(), "the disk is away")
        sweep()

    monkeypatch.setattr(store, "sweep", troubled)
    async with supervising(store):
        await until(lambda: state(store, task.id) == "ready")
    assert caplog.text.count("cannot be run") == 2


@pytest.mark.parametrize(("code", "kind"), [(28, "disk-full"), (5, "died")])
async def test_a_failure_that_cannot_be_written_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    """While a disk takes no status a dead job is not run again and others go on; then it fails."""
    write, full, tried = Status.write, [True], []

    def troubled(status: Status, folder: Path) -> None:
        if full and status.state == "failed":
            tried.append(folder.name)
            raise OSError(code, "the disk takes nothing")
        write(status, folder)

    monkeypatch.setattr(Status, "write", troubled)
    poison, other = create(store, "die"), create(store)
    async with supervising(store, replace(FAST, aside=0.3)):
        await until(lambda: state(store, other.id) == "ready")
        await until(lambda: len(tried) >= 3)
        assert len(starts(store, poison)) == 4
        assert state(store, poison.id) == "running"
        full.clear()
        await until(lambda: state(store, poison.id) == "failed")
    assert len(starts(store, poison)) == 4
    assert len(tried) < 30
    problem = store.get(poison.id).status.problem
    assert problem is not None
    assert problem["kind"] == kind


async def test_a_job_that_cannot_be_started_is_put_aside(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trouble in one job's folder lets the next job go on, and the first one once it is over."""
    first, other = create(store), create(store, seed=1)
    (store.jobs / first.id / LOG).mkdir()
    async with supervising(store, replace(FAST, aside=0.05)):
        await until(lambda: state(store, other.id) == "ready")
        assert starts(store, first) == []
        (store.jobs / first.id / LOG).rmdir()
        await until(lambda: state(store, first.id) == "ready")


async def test_what_a_job_left_goes_at_its_end(store: Store) -> None:
    """Half-made bundles of a job's killed processes are removed once it has ended."""
    task = create(store, "wait")
    async with supervising(store):
        await until(lambda: store.get(task.id).status.stage == "finetuning")
        (store.tasks / f".partial-{task.id}-x").mkdir()
        (store.jobs / task.id / GO).touch()
        await until(lambda: state(store, task.id) == "ready")
        await until(lambda: not list(store.tasks.glob(".partial-*")))


def test_the_log_is_bounded(store: Store) -> None:
    """A log is added to up to 1 MB and then starts anew, while its process goes on writing."""
    task = create(store)
    code = "import time\nwhile True: print('more', flush=True); time.sleep(0.01)"
    run = Run(store.jobs / task.id, store.tasks, (sys.executable, "-c", code), FAST)
    log = store.jobs / task.id / LOG
    log.write_bytes(bytes(LOG_BYTES))
    run.step()
    assert log.stat().st_size >= LOG_BYTES
    try:
        wait_until(lambda: run.step() or log.stat().st_size < LOG_BYTES)
        wait_until(lambda: log.read_text().startswith("more"))
    finally:
        run.stop()


def test_the_job_is_of_our_session_and_deaf_to_our_ctrl_c(store: Store) -> None:
    """Priorities count among the processes of one session; Ctrl-C is for one group of them."""
    run = Run(store.jobs / create(store).id, store.tasks, ("sleep", "60"), FAST)
    run.step()
    try:
        child = run._child
        assert child is not None
        assert os.getsid(child.pid) == os.getsid(0)
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
    finally:
        run.stop()


def test_the_child_ends_with_a_killed_parent(store: Store) -> None:
    """kill -9 of the process that runs a job ends the job's process too, and frees the job."""
    task = create(store, "wait")
    code = (
        "import asyncio, pathlib, sys; from tests.support.adapting import *;"
        "store = make_store(pathlib.Path(sys.argv[1]));"
        "asyncio.run(Supervisor(store, FAKE, FAST).run(asyncio.Event()))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(store.jobs.parent)])  # noqa: S603
    try:
        wait_until(lambda: store.get(task.id).status.stage == "finetuning")
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_running(store.jobs / task.id))
    wait_until(lambda: not is_alive(starts(store, task)[0]))
    (store.jobs / task.id / GO).touch()

    async def go_on() -> None:
        async with supervising(store):
            await until(lambda: state(store, task.id) == "ready")

    asyncio.run(go_on())


def test_the_command_is_the_models_own() -> None:
    """By default a job is run by the module that the contract names."""
    assert process.JOB[1:] == ("-m", "models.adaptation.job")
    assert FAKE[0] == process.JOB[0]


def test_a_process_ends_where_nobody_attends_to_it(store: Store) -> None:
    """Without steps a job's process ends by itself, which is not held against the job."""
    task = create(store, "wait")
    run = Run(store.jobs / task.id, store.tasks, FAKE, FAST, silence=2.0)

    def at_it(times: int) -> bool:
        run.step()
        return len(starts(store, task)) == times and Status.read(run.job).stage == "finetuning"

    try:
        for times in range(1, 7):  # Oftener than a process may die.
            wait_until(lambda times=times: at_it(times))
            wait_until(lambda: not works(starts(store, task)[-1]))
        (store.jobs / task.id / GO).touch()
        wait_until(run.step)
    finally:
        run.stop()
    assert state(store, task.id) == "ready"


def test_a_job_that_its_worker_lost_waits_and_counts(store: Store) -> None:
    """A job that says it runs, and that nobody looks after, has lost its worker: that counts, and
    where machines may not share locks its process has time to end by itself."""
    task, clock = create(store), FakeClock()
    job = store.jobs / task.id
    Status("running", progress=0.25, attempts=2, furthest=0.25).write(job)
    run = Run(job, store.tasks, FAKE, FAST, clock, silence=7.5)
    try:
        for seconds in (0.0, 7.0):
            clock.advance(seconds)
            run.step()
            assert starts(store, task) == []
        status = Status.read(job)
        assert (status.state, status.attempts, status.progress) == ("queued", 3, 0.25)
        clock.advance(0.5)
        wait_until(run.step)
    finally:
        run.stop()
    assert state(store, task.id) == "ready"


def test_progress_clears_the_attempts(store: Store) -> None:
    """A worker's loss after progress is the first one again."""
    task = create(store)
    Status("running", progress=0.5, attempts=3, furthest=0.25).write(store.jobs / task.id)
    run = Run(store.jobs / task.id, store.tasks, FAKE, FAST, silence=60)
    run.step()
    run.stop()
    status = Status.read(store.jobs / task.id)
    assert (status.attempts, status.furthest) == (1, 0.5)


def test_an_abandoned_job_is_left_as_it_is(store: Store) -> None:
    """A run that is abandoned kills its process, lets go of the job and writes nothing."""
    task = create(store, "wait")
    run = Run(store.jobs / task.id, store.tasks, FAKE, FAST)
    wait_until(lambda: run.step() or Status.read(run.job).stage == "finetuning")
    before = (run.job / STATUS).stat().st_mtime_ns
    run.abandon()
    assert not works(starts(store, task)[0])
    assert not run.is_mine
    assert not is_running(run.job)
    assert (run.job / STATUS).stat().st_mtime_ns == before
    run.stop()
    assert state(store, task.id) == "running"
