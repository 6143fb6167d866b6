"""The processes of one adaptation job: started, watched, restarted and ended."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from models.adaptation.plan import STATUS, UNATTENDED, Status
from service.operations.logs import naming
from service.tasks.repository import is_running

logger = logging.getLogger("vouchsafe.tasks")

JOB = (sys.executable, "-m", "models.adaptation.job")
"""The command that runs a job. Its arguments: the job's folder, the folder to publish in, that of
fetched networks, and the seconds without a step after which it exits."""
CLAIM = "claim"
"""Locked by the process that supervises the job, as `lock` is by the process that computes it."""
LOG = "log.txt"
LOG_BYTES = 2**20
ATTEMPTS = 4
"""Crashes of a job's process or its worker, without progress in between, that fail the job."""
GRACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Times in seconds.

    - `look`: between two steps of a run.
    - `poll`: between two searches for jobs.
    - `restart`: before a crashed process is started again.
    - `news`: without a change of the status until a process counts as hung.
    - `aside`: for which a job is postponed after an error of its folder.
    """

    look: float = 0.2
    poll: float = 1.0
    restart: float = 1.0
    news: float = 1_800.0
    aside: float = 60.0


class Run:
    """Runs one job's processes, one after another, until the job has ended.

    `step` does not block. A job that another process supervises is only watched. Call `stop` or
    `abandon` at the end; a stopped run can go on. The job's status counts crashes without progress.
    With `silence`, a process exits after that many seconds without a step.
    """

    def __init__(
        self,
        job: Path,
        tasks: Path,
        command: Sequence[str] = JOB,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        models: Path | None = None,
        silence: float | None = None,
    ) -> None:
        self.job = job
        self._arguments = [*command, *map(str, (job, tasks, *([models] if models else [])))]
        self._silence = silence
        if silence is not None:
            self._arguments += ["--silence", str(silence)]
        self._patience = patience or Patience()
        self._clock = clock
        self._child: subprocess.Popen[bytes] | None = None
        self._claim: BinaryIO | None = None
        self._start_at = clock()
        self._is_new = True
        self._attempts = 0
        self._furthest = 0.0
        self._last_crash = ""
        self._disk_was_full = False
        self._news: tuple[int, float] = (0, clock())

    @property
    def is_mine(self) -> bool:
        """Whether this process supervises the job."""
        return self._claim is not None

    def step(self) -> bool:
        """Start, check or restart the process; True once the job has ended or was removed.

        Raises OSError for a job's folder that cannot be read or written.
        """
        if not self.job.is_dir():
            self._kill()
            return True
        if self._child is None:
            return self._start_if_needed()
        code = self._child.poll()
        if code is None:
            self._watch(self._child)
            return False
        self._forget_child(self._child)
        if code == 0 and Status.read(self.job).ended:
            return True
        return self._crashed(code)

    def stop(self) -> None:
        """End the process, if any; the job can go on later from its checkpoints."""
        try:
            if self._child is not None:
                self._end(self._child)
        except OSError as error:
            self._log(logging.ERROR, "its status cannot be written: %s", error)
        finally:
            self._release_claim()

    def abandon(self) -> None:
        """Kill the process, if any, and leave the folder to its new owner."""
        self._kill()
        self._release_claim()

    def _log(self, level: int, message: str, *values: object) -> None:
        name = self.job.name
        logger.log(level, f"job %s: {message}", name, *values, extra=naming(task_id=name))

    def _release_claim(self) -> None:
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        if child.stdin is not None:
            child.stdin.close()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        self._forget_child(child)
        if self.job.is_dir() and not (status := Status.read(self.job)).ended:
            status.changed(state="queued", eta_seconds=None).write(self.job)

    def _start_if_needed(self) -> bool:
        if Status.read(self.job).ended:
            return not is_running(self.job)
        if not self._claimed():
            return False
        if self._is_new:
            self._resume()
        if self._attempts >= ATTEMPTS:
            return self._give_up()
        if self._clock() >= self._start_at and not is_running(self.job):
            self._start()
        return False

    def _resume(self) -> None:
        """Read the job's count of crashes.

        A job whose status is still `running` has lost its worker. Machines may not share file
        locks, so the old process may still run: a new one is started only after `silence` seconds.
        """
        status = Status.read(self.job)
        self._attempts, self._furthest, self._is_new = status.attempts, status.furthest, False
        if status.state == "running":
            self._log(logging.WARNING, "its worker was lost")
            self._count("its worker was lost", self._silence or 0.0)

    def _claimed(self) -> bool:
        """Claim the job for this process, unless another has claimed it or it was removed."""
        if self._claim is None:
            try:
                claim = (self.job / CLAIM).open("ab")
            except FileNotFoundError:
                return False
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                claim.close()
                return False
            self._claim = claim
        return True

    def _start(self) -> None:
        # Written before the process starts: a crash that ends the worker at once counts too.
        Status.read(self.job).changed(state="running").write(self.job)
        self._trim_log()
        with (self.job / LOG).open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603 - our own command and folders.
                self._arguments,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C at the terminal is for the parent. A new session would void the job's low
                # priority: Linux gives sessions equal shares (autogroup).
                process_group=0,
            )
        if self._child.stdin is not None:
            os.set_blocking(self._child.stdin.fileno(), False)
        self._news = (0, self._clock())

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        if child.stdin is not None:
            with suppress(BlockingIOError, BrokenPipeError):  # The process is suspended or dead.
                os.write(child.stdin.fileno(), b".")
        self._trim_log()
        written = _time_of_change(self.job / STATUS)
        if written != self._news[0]:
            self._news = (written, self._clock())
        elif self._clock() - self._news[1] > self._patience.news:
            self._log(
                logging.ERROR, "its status has not changed for %g s; ended", self._patience.news
            )
            child.kill()

    def _trim_log(self) -> None:
        """Truncate a log above LOG_BYTES; its writer appends."""
        log = self.job / LOG
        if log.is_file() and log.stat().st_size > LOG_BYTES:
            os.truncate(log, 0)

    def _crashed(self, code: int) -> bool:
        if code == UNATTENDED:
            self._log(logging.WARNING, "its process exited after no step was taken")
            self._start_at = self._clock() + self._patience.restart
            return False
        how = f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"
        self._log(logging.ERROR, "its process %s; see its %s", how, LOG)
        self._count(f"its process {how}", self._patience.restart)
        return self._attempts >= ATTEMPTS and self._give_up()

    def _count(self, crash: str, pause: float) -> None:
        """Count a crash; the next process starts after `pause` seconds."""
        status = Status.read(self.job)
        if status.progress > self._furthest:
            self._furthest, self._attempts = status.progress, 0
        self._attempts, self._last_crash = self._attempts + 1, crash
        self._start_at = self._clock() + pause
        if self._attempts < ATTEMPTS:  # Otherwise, the failure is written next.
            counted = status.changed(attempts=self._attempts, furthest=self._furthest)
            counted.changed(state="queued", eta_seconds=None).write(self.job)

    def _give_up(self) -> bool:
        """Write that the job failed; raises OSError, and the next step tries again."""
        failed = Status.read(self.job).changed(state="failed", finished=time.time())
        failed = failed.changed(problem=self._problem(), eta_seconds=None)
        try:
            failed.write(self.job)
        except OSError as error:
            self._disk_was_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise
        return True

    def _problem(self) -> dict[str, str]:
        kind, cause = "died", "Too little memory is the likeliest cause"
        if self._disk_was_full:
            kind, cause = "disk-full", "The disk was full: make room on it, or delete tasks"
        detail = (
            f"The adaptation died {self._attempts} times without getting further, at last because "
            f"{self._last_crash}. {cause}; jobs/{self.job.name}/{LOG} in the data directory has "
            "the end of its output. Post the same task to try again"
        )
        return {"kind": kind, "detail": detail}

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._forget_child(self._child)

    def _forget_child(self, child: subprocess.Popen[bytes]) -> None:
        if child.stdin is not None:
            child.stdin.close()
        self._child = None


def _time_of_change(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
