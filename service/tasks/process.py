"""One adaptation job's processes: started, watched, started again where they die, ended."""

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
"""The command that runs a job, given its folder, the folder to publish in, the one of fetched
networks, and for how many seconds it goes on unattended."""
CLAIM = "claim"
"""Held locked by the process that looks after the job, as `lock` is by the one that computes it."""
LOG = "log.txt"
LOG_BYTES = 2**20
ATTEMPTS = 4
"""How often a job's process, or its worker, may die before the job gets any further."""
GRACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: between two looks at a process, between two looks for jobs, before a process that
    died is started again, without news until it counts as hung, and for which a job is put aside
    whose folder is in trouble."""

    look: float = 0.2
    poll: float = 1.0
    restart: float = 1.0
    news: float = 1_800.0
    aside: float = 60.0


class Run:
    """One job's processes, one after another until the job has ended; a step takes no time.

    A job that another process looks after is only watched. `stop` or `abandon` must be called in
    the end; a run that was stopped can go on. How often processes have died without getting further
    is counted in the job's status. With `silence` a process ends by itself where no step was taken
    for that many seconds.
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
        self._last_death = ""
        self._disk_was_full = False
        self._news: tuple[int, float] = (0, clock())

    @property
    def is_mine(self) -> bool:
        """Whether it is this process that looks after the job."""
        return self._claim is not None

    def step(self) -> bool:
        """Look after the process; True once nothing is left to do: ended, or removed.

        Raises OSError where the job's folder is in trouble.
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
        self._leave(self._child)
        if code == 0 and Status.read(self.job).ended:
            return True
        return self._died(code)

    def stop(self) -> None:
        """End the process, if there is one; the job can go on later from its checkpoints."""
        try:
            if self._child is not None:
                self._end(self._child)
        except OSError as error:
            self._tell(logging.ERROR, "its status cannot be written: %s", error)
        finally:
            self._let_go()

    def abandon(self) -> None:
        """Kill the process, if there is one, and leave the folder to its new owner."""
        self._kill()
        self._let_go()

    def _tell(self, level: int, message: str, *told: object) -> None:
        name = self.job.name
        logger.log(level, f"job %s: {message}", name, *told, extra=naming(task_id=name))

    def _let_go(self) -> None:
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
        self._leave(child)
        if self.job.is_dir() and not (status := Status.read(self.job)).ended:
            status.changed(state="queued", eta_seconds=None).write(self.job)

    def _start_if_needed(self) -> bool:
        if Status.read(self.job).ended:
            return not is_running(self.job)
        if not self._claimed():
            return False
        if self._is_new:
            self._take_up()
        if self._attempts >= ATTEMPTS:
            return self._give_up()
        if self._clock() >= self._start_at and not is_running(self.job):
            self._start()
        return False

    def _take_up(self) -> None:
        """Go on with the job's own count.

        A job that says it runs was lost by its worker. Where machines do not share locks its
        process may last a little, so none is started before `silence` has passed.
        """
        status = Status.read(self.job)
        self._attempts, self._furthest, self._is_new = status.attempts, status.furthest, False
        if status.state == "running":
            self._tell(logging.WARNING, "its worker went away")
            self._count("its worker went away", self._silence or 0.0)

    def _claimed(self) -> bool:
        """Take the job for this process, unless another has it or it has just been removed."""
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
        # Before the process says so itself: one that takes its worker with it at once counts too.
        Status.read(self.job).changed(state="running").write(self.job)
        self._trim_log()
        with (self.job / LOG).open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603 - our own command and folders.
                self._arguments,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C at the terminal is for its parent. Not a session of its own: Linux weighs
                # sessions alike (autogroup), and the job's low priority would count for nothing.
                process_group=0,
            )
        if self._child.stdin is not None:
            os.set_blocking(self._child.stdin.fileno(), False)
        self._news = (0, self._clock())

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        if child.stdin is not None:
            with suppress(BlockingIOError, BrokenPipeError):  # It is stopped, or dead.
                os.write(child.stdin.fileno(), b".")
        self._trim_log()
        written = _time_of_change(self.job / STATUS)
        if written != self._news[0]:
            self._news = (written, self._clock())
        elif self._clock() - self._news[1] > self._patience.news:
            self._tell(logging.ERROR, "no news for %g s; ended", self._patience.news)
            child.kill()

    def _trim_log(self) -> None:
        """Empty the log where it has grown too long; its writer appends."""
        log = self.job / LOG
        if log.is_file() and log.stat().st_size > LOG_BYTES:
            os.truncate(log, 0)

    def _died(self, code: int) -> bool:
        if code == UNATTENDED:
            self._tell(logging.WARNING, "its process was not attended to, and ended")
            self._start_at = self._clock() + self._patience.restart
            return False
        how = f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"
        self._tell(logging.ERROR, "its process %s; see its %s", how, LOG)
        self._count(f"its process {how}", self._patience.restart)
        return self._attempts >= ATTEMPTS and self._give_up()

    def _count(self, death: str, pause: float) -> None:
        """Count a death; no process is started before `pause` seconds have passed."""
        status = Status.read(self.job)
        if status.progress > self._furthest:
            self._furthest, self._attempts = status.progress, 0
        self._attempts, self._last_death = self._attempts + 1, death
        self._start_at = self._clock() + pause
        if self._attempts < ATTEMPTS:  # Else its failure is written next.
            counted = status.changed(attempts=self._attempts, furthest=self._furthest)
            counted.changed(state="queued", eta_seconds=None).write(self.job)

    def _give_up(self) -> bool:
        """Let the job fail; where that cannot be written it is for the next step to do."""
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
            f"{self._last_death}. {cause}; jobs/{self.job.name}/{LOG} in the data directory has "
            "its last words. Post the same task to try again"
        )
        return {"kind": kind, "detail": detail}

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._leave(self._child)

    def _leave(self, child: subprocess.Popen[bytes]) -> None:
        if child.stdin is not None:
            child.stdin.close()
        self._child = None


def _time_of_change(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
