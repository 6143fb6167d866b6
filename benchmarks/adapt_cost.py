"""Cost of one adaptation on an otherwise idle machine: `python -m benchmarks.adapt_cost`.

Runs a job as `vouchsafe adapt` does, in a separate process and a temporary folder. Prints one JSON:
the dtype of its UNets, the seconds of each stage, and the peak memory of the job's process or of
its largest child.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.adaptation.plan import STATUS, Plan, Status
from models.bundle import DEFAULT_TASK, read_bundle
from service.config import Settings
from service.secrets import SECRET_BYTES
from service.tasks import process
from service.tasks.store import Store

NAME = "adapt_cost"
STARTING = "starting"
LOOK_SECONDS = 0.05


def measured(plan: Plan, data_dir: Path) -> dict[str, Any]:
    """The plan's job, run in this folder to its end; raises RuntimeError where it fails."""
    settings = Settings(data_dir=data_dir, api_keys=(), api_keys_file=None)
    store = Store(settings, bytes(SECRET_BYTES))
    task = store.create(plan, NAME, None)
    job = store.jobs / task.id
    run = process.Run(job, store.tasks, process.JOB)
    stage, seconds, began = STARTING, dict[str, float](), time.perf_counter()
    since = time.time()
    try:
        while not run.step():
            now, written = _stage_of(job)
            if now is not None and now != stage:
                seconds[stage] = written - since
                stage, since = now, written
            time.sleep(LOOK_SECONDS)
    finally:
        run.stop()
    ended, whole = time.time(), time.perf_counter() - began
    status = Status.read(job)
    if status.state != "ready":
        raise RuntimeError(f"the adaptation {status.state}: {status.problem}")
    seconds |= {stage: ended - since, "whole": whole}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "dtype": read_bundle(store.tasks / task.id).adaptation["dtype"],
        "seconds": {name: round(taken, 1) for name, taken in seconds.items()},
        "peak memory of the job's largest process, MiB": round(peak / 1024),
        "figures": dict(status.figures),
    }


def _stage_of(job: Path) -> tuple[str | None, float]:
    """The stage in the job's status, and the time when the status was written."""
    try:
        with (job / STATUS).open() as stream:
            return json.load(stream)["stage"], os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return None, time.time()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", help="split by commas; the default task's unless given")
    for setting in ("shots", "steps", "epochs"):
        parser.add_argument(f"--{setting}", type=int, help="the set's own unless given")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args(given)
    plan = Plan.checked(
        arguments.labels.split(",") if arguments.labels else read_bundle(DEFAULT_TASK).labels,
        shots=arguments.shots,
        steps=arguments.steps,
        epochs=arguments.epochs,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = measured(plan, Path(folder))
    # Imported only now: a child's memory starts at its parent's, which is small without torch.
    from benchmarks.machine import machine
    from models.smoothing import best_device

    report = {
        "plan": asdict(plan),
        "cores": len(os.sched_getaffinity(0)),
        "machine": machine(best_device()),
        **result,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
