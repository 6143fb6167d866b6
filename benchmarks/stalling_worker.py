"""`vouchsafe worker` whose networks stall once the file in VOUCHSAFE_STALL exists."""

from __future__ import annotations

import os
import sys
import threading
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from models.runtime import RUNTIMES, Network, Torch
from service.cli.main import main
from service.processes import runtime as serving
from service.worker.compute import ComputeThread


class Stalling(Torch):
    """Eager torch, until it stalls."""

    def prepare(self, network: nn.Module) -> Network:
        def run(*inputs: Tensor) -> Tensor:
            if Path(os.environ["VOUCHSAFE_STALL"]).exists():
                threading.Event().wait()
            answer: Tensor = network(*inputs)
            return answer

        return run


if __name__ == "__main__":
    RUNTIMES["torch"] = Stalling
    serving.ComputeThread = partial(ComputeThread, batch_seconds_limit=2.0)  # type: ignore
    sys.argv[1:1] = ["worker"]
    main()
