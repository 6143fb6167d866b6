"""One table of several evaluations: `python -m benchmarks.results FOLDER/results.json ...`.

Prints, as Markdown, a line for each run of `vouchsafe evaluate`: clean accuracy, that under attack,
certified accuracy by radius, and ACR. All evaluations must be of the same images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ATTACKED, CERTIFIED = ("0.25", "0.5", "1"), ("0", "0.25", "0.5", "0.75", "1")


def main() -> None:
    """Print the table."""
    documents = [json.loads(Path(argument).read_text()) for argument in sys.argv[1:]]
    if len({document["images"]["sha256"] for document in documents}) != 1:
        sys.exit("the evaluations are of different images")
    heads = ["run", "clean", *(f"attacked, eps {eps}" for eps in ATTACKED)]
    heads += [*(f"certified at {radius}" for radius in CERTIFIED), "ACR", "s an image"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for document in documents:
        for name, run in document["runs"].items():
            print(f"| {name} | {' | '.join(cells(run))} |")


def cells(run: dict[str, Any]) -> list[str]:
    """The run's figures in the table's order, empty where it has none."""
    by_attack = run.get("attacks", {}).get("by attack", {})
    attacked = next((by_attack[name] for name in ("pgd", "eot") if name in by_attack), {})
    radius = run.get("ACR")
    seconds = run["seconds"] / run["images"] if "seconds" in run else None
    return [
        percent(run["clean"]),
        *(percent(attacked.get(eps, {}).get("robust")) for eps in ATTACKED),
        *(percent(run.get("certified", {}).get(radius)) for radius in CERTIFIED),
        "" if radius is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**radius),
        "" if seconds is None else f"{seconds:.1f}",
    ]


def percent(share: dict[str, float] | None) -> str:
    """A share with its interval, in percent."""
    if share is None:
        return ""
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * share[end] for end in ("value", "low", "high")))


if __name__ == "__main__":
    main()
