"""One adaptation, from a plan to a bundle: `python -m models.adaptation.job JOB TASKS [MODELS]`.

JOB is the folder that holds `plan.json`; the bundle appears as TASKS/<name of JOB>. Networks that
do not ship with the package are read below MODELS. The process may be killed at any point; when
started again, it resumes from its last checkpoint.

The process ends when its standard input does, so it never outlives its starter. With `--silence
SECONDS` it also ends after that many seconds without input. So it does not outlive a lease that a
stopped or disconnected starter cannot release.
"""

from __future__ import annotations

import argparse
import os
import select
import threading
from pathlib import Path

from models.adaptation.plan import UNATTENDED

NICENESS = 10
"""About a tenth of a core that predictions want whole; at 19 a job would all but stand still."""


def end_unattended(silence: float | None) -> None:
    """End this process with its standard input, or after `silence` seconds without input."""
    # Not sys.stdin, whose lock would outlive the thread at exit.
    while select.select([0], [], [], silence)[0] and os.read(0, 1024):
        pass
    os._exit(UNATTENDED)


def main() -> None:
    """Run a job at low priority until it ends or standard input does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("models", type=Path, nargs="?")
    parser.add_argument("--silence", type=float)
    arguments = parser.parse_args()
    os.nice(NICENESS)
    threading.Thread(target=end_unattended, args=(arguments.silence,), daemon=True).start()
    # Imported only now: the import takes seconds, at low priority too.
    from models.adaptation.stages import run
    from models.memory import cap_adaptation
    from models.smoothing import best_device

    device = best_device()
    cap_adaptation(device)
    run(arguments.job, arguments.tasks, device, arguments.models)


if __name__ == "__main__":
    main()
