"""`vouchsafe worker` that records each row of noise it draws in the file VOUCHSAFE_RECORD names.

A line is the key in hex, the row's index, and the SHA-256 of its noise.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch import Tensor

from benchmarks.fleet import row_hashes
from models import smoothing
from models.noise import discrete_gaussian
from service.cli.main import main


def recorded(
    key: bytes, start: int, stop: int, shape: tuple[int, int, int], sigma: float, device: object
) -> Tensor:
    noise = discrete_gaussian(key, start, stop, shape, sigma, device)  # type: ignore[arg-type]
    with Path(os.environ["VOUCHSAFE_RECORD"]).open("a") as log:
        for row, digest in zip(range(start, stop), row_hashes(noise), strict=True):
            log.write(f"{key.hex()} {row} {digest}\n")
    return noise


if __name__ == "__main__":
    smoothing.discrete_gaussian = recorded  # type: ignore[assignment]
    sys.argv[1:1] = ["worker"]
    main()
