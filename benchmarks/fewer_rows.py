"""A log as fewer rows would have certified it, to stand beside another of as many rows.

`python -m benchmarks.fewer_rows LOG --n 100000 --sigma 0.25 --rows 1000 --out LOG`

The votes behind each radius are inverted from it, and the image keeps their share, to the nearest
vote of the fewer rows; the label that was selected stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.certificates.bounds import clopper_pearson_lower
from models.certificates.rules import certified_radius
from models.evaluation.logs.printed_radii import invert
from models.evaluation.logs.reading import HEADER, read_log


def main() -> None:
    """Write the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("--n", type=int, required=True, help="rows of the log's estimation")
    parser.add_argument("--sigma", type=float, required=True)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--rows", type=int, default=1000, help="rows of the log to write")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = read_log(arguments.log)
    certified = [line for line in lines if line.certified]
    found = invert(
        [line.radius for line in certified], arguments.n, arguments.sigma, arguments.alpha
    )
    if found.inconsistent:
        parser.error(f"{found.inconsistent} radii are not of --n = {arguments.n}")
    shares = (found.least + found.most) / (2 * arguments.n)
    votes = {
        line.index: round(share * arguments.rows)
        for line, share in zip(certified, shares.tolist(), strict=True)
    }
    with arguments.out.open("w") as file:
        file.write(HEADER)
        for line in lines:
            radius = 0.0
            if line.certified:
                bound = clopper_pearson_lower(votes[line.index], arguments.rows, arguments.alpha)
                radius = certified_radius(bound, arguments.sigma)
            predict = line.predict if radius > 0 else -1
            correct = int(predict == line.truth)
            fields = (line.index, line.truth, predict, f"{radius:.6f}", correct, line.seconds)
            file.write("\t".join(map(str, fields)) + "\n")


if __name__ == "__main__":
    main()
