"""Prints a CSV of paths and labels for the development set of the NIPS 2017 competition.

`.venv/bin/python docs/examples/photographs.py FOLDER > photographs.csv` reads `images.csv` of the
folder, whose columns ImageId and TrueLabel (from 1) are used, and names `images/ImageId.png`.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from imagenet import labels


def main(folder: str) -> None:
    """Print the header and a line for each photograph, in the order of `images.csv`."""
    root, names = Path(folder).resolve(), labels()
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(("path", "label"))
    with (root / "images.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            image = root / "images" / f"{row['ImageId']}.png"
            out.writerow((image, names[int(row["TrueLabel"]) - 1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
