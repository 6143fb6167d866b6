"""An adaptation process without networks: `python fake_adaptation.py JOB TASKS`, as the contract.

The first word of the plan's template selects the behavior, or of the task's name where the template
is the set's own:

- `slow` takes a second for each stage, `slower` four;
- `die` always dies, `once` dies the first time, `crawl` dies each time but progresses further;
- `hang` reports once and then nothing more, `everywhere` hangs in one stage more at each start
  until there is none left;
- `wait` waits until the job's folder has a file `go`;
- `poison` kills its starter;
- `fail` ends with a problem.

Any other word just works.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from PIL import Image

from models.adaptation.job import end_unattended
from models.adaptation.plan import REFERENCES, STAGES, Plan, Status, locked, name_of
from models.bundle import DEFAULT_TASK, PROMPT_STATES, read_bundle, write_bundle
from models.nano.captions import DEFAULT_TEMPLATE

STARTS = "starts.txt"
OVERLAPS = "overlaps.txt"
"""Written to by a process that finds another of its job alive: locks, where there are any, or
leases should have kept it from starting."""
GO = "go"
PARENT = os.getppid()
FIGURES = {"clean": 0.5}


def adapt(job: Path, tasks: Path, starts: int) -> None:
    plan, earlier = Plan.read(job), Status.read(job)
    status = Status("running", attempts=earlier.attempts, furthest=earlier.furthest)
    status = status.changed(started=time.time())
    words = name_of(job) if plan.template == DEFAULT_TEMPLATE else plan.template
    ways = words.split()[0].lower()
    left_out = {"personalizing": not plan.steps, "finetuning": not plan.epochs}
    if not (tasks / job.name).exists():
        pictures(job / REFERENCES, plan)
        for done, stage in enumerate(STAGES):
            if left_out.get(stage):
                continue
            status = status.changed(stage=stage, progress=done / 4, eta_seconds=4.0 - done)
            status = status.changed(losses={**status.losses, stage: 1 / (done + 1)})
            status.write(job)
            behave(ways, job, done, starts)
            if ways == "fail" and done == 1:
                problem = {"kind": "diverged", "detail": "The loss is not a number; lower steps"}
                status.changed(state="failed", problem=problem, finished=time.time()).write(job)
                return
        publish(job, tasks, plan, name_of(job))
    ready = status.changed(state="ready", stage=None, progress=1.0, figures=FIGURES)
    ready.changed(eta_seconds=None, finished=time.time()).write(job)


def behave(ways: str, job: Path, done: int, starts: int) -> None:
    dies = ways == "die" or (ways == "once" and starts == 1) or ways == "crawl"
    if dies and done == (starts - 1 if ways == "crawl" else 1) and done < 3:
        print("dying now", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if ways == "poison" and done == 1:
        if os.getppid() == PARENT:
            os.kill(PARENT, signal.SIGKILL)
        threading.Event().wait()
    while (ways == "hang" or (ways == "wait" and not (job / GO).exists())) and done == 2:
        time.sleep(0.01)
    time.sleep({"slow": 1, "slower": 4}.get(ways, 0))
    while ways == "everywhere" and done == starts - 1:
        time.sleep(0.01)


def pictures(folder: Path, plan: Plan) -> None:
    folder.mkdir(exist_ok=True)
    for label in range(len(plan.labels)):
        for shot in range(plan.shots):
            partial = folder / f".{label}-{shot}.png"
            Image.new("RGB", (32, 32), (20 * label, 60 * shot, 99)).save(partial)
            partial.rename(folder / f"{label}-{shot}.png")


def publish(job: Path, tasks: Path, plan: Plan, name: str = "made by the fake") -> None:
    bundle = replace(
        read_bundle(DEFAULT_TASK),
        id=job.name,
        name=name,
        labels=plan.labels,
        template=plan.template,
        adaptation={"dtype": "float16"},
        figures=FIGURES,
        prompts=plan.prompts,
    )
    write_bundle(tasks / job.name, bundle, {PROMPT_STATES: DEFAULT_TASK / PROMPT_STATES})


def works(process: int) -> bool:
    """Whether a process has not ended, be it stopped; one that is not waited for has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


if __name__ == "__main__":
    silence = float(sys.argv[-1]) if "--silence" in sys.argv else None
    threading.Thread(target=end_unattended, args=(silence,), daemon=True).start()
    folder = Path(sys.argv[1])
    with locked(folder):
        with (folder / STARTS).open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        begun = [int(line) for line in (folder / STARTS).read_text().split()]
        if others := [process for process in begun[:-1] if works(process)]:
            with (folder / OVERLAPS).open("a") as stream:
                stream.write(f"{others}\n")
        adapt(folder, Path(sys.argv[2]), len(begun))
