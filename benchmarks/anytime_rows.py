"""Simulated rows of early stopping: `python -m benchmarks.anytime_rows`.

For images whose class has probability p, and targets Phi^-1(p0) sigma: the mean number of
estimation rows, and how they ended. With `--log`, for the images of a published certification log
and beside the two-sided rule on all rows. Seeded, so a run repeats itself to the row. Votes that
are not for the class go to one rival, or evenly to as many classes as `--others` says.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from models.certificates.alpha import alpha_shares
from models.certificates.anytime import (
    Anytime,
    Decision,
    at_look,
    certify_anytime,
    check_anytime,
    look_schedule,
)
from models.certificates.bounds import clopper_pearson_lower
from models.certificates.rules import bound_votes, certified_radius

PROBABILITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
TARGETS = (0.6, 0.7, 0.8, 0.9, 0.95)
SIGMA, N0, SEED = 1.0, 16, 0
FIXED_N0 = 100
LOG_N, LOG_ALPHA = 100_000, 0.001
"""Rows and alpha of the published logs (Cohen et al. 2019)."""


class Simulated(NamedTuple):
    """Of each run: the estimation rows, the decision that ended them, whether the target was
    reached, and whether the two-sided rule reaches it on all rows."""

    rows: NDArray[np.int64]
    ended: list[Decision]
    reached: NDArray[np.bool_]
    fixed: NDArray[np.bool_]


def simulate(
    probabilities: ArrayLike, others: int, target: float, n: int, alpha: float
) -> Simulated:
    """A run for each probability (runs,) of the class; `target` in units of sigma."""
    p = np.asarray(probabilities, np.float64)[:, None]
    shares = np.hstack([p, *[(1.0 - p) / others] * others])
    looks = look_schedule(n, SIGMA, alpha, target)
    two_sided = alpha_shares("two-sided", alpha)
    random = np.random.default_rng(SEED)

    def votes_of(rows: int, k: int, most: int) -> list[int]:
        votes = [k, most]
        while rest := rows - sum(votes):
            votes.append(min(rest, most))
        return votes

    # An earlier look that reached the target has ended the run, so that one look decides.
    @functools.cache
    def decide(rows: int, k: int, most: int) -> tuple[Decision, bool]:
        question = Anytime(SIGMA, alpha, N0, n, target, (rows,), 0.0)
        votes = votes_of(rows, k, most)
        selection = [N0] + [0] * (len(votes) - 1)
        decision = at_look(question, selection, [votes])
        if decision is not Decision.END:
            return decision, decision is Decision.REACHED
        return decision, bool(certify_anytime(question, selection, [votes]).target_reached)

    @functools.cache
    def is_certified(k: int, most: int) -> bool:
        votes = tuple(votes_of(n, k, most))
        return bound_votes(0, votes, SIGMA, two_sided, 0.0).radius >= target

    drawn = np.zeros(len(p), np.int64)
    ended = [Decision.CONTINUE] * len(p)
    reached = np.zeros(len(p), np.bool_)
    votes = np.zeros(shares.shape, np.int64)
    for before, rows in itertools.pairwise((0, *looks)):
        votes += random.multinomial(rows - before, shares)
        for run in [i for i, how in enumerate(ended) if how is Decision.CONTINUE]:
            k, most = int(votes[run, 0]), int(votes[run, 1:].max())
            ended[run], reached[run] = decide(rows, k, most)
            drawn[run] = rows
    pairs = zip(votes[:, 0].tolist(), votes[:, 1:].max(axis=1).tolist(), strict=True)
    return Simulated(drawn, ended, reached, np.array(list(itertools.starmap(is_certified, pairs))))


def rows_of(
    p: float, others: int, target: float, n: int, alpha: float, runs: int
) -> tuple[float, Counter[str], float]:
    """Mean rows, how the runs ended, and the share of runs whose target was reached."""
    found = simulate(np.full(runs, p), others, target, n, alpha)
    return float(found.rows.mean()), Counter(found.ended), float(found.reached.mean())


def logged_probabilities(path: Path, sigma: float) -> list[float]:
    """The class's share of the votes behind each radius of a published log; 1/2 on abstention."""

    @functools.cache
    def share(radius: float) -> float:
        k = bisect_left(
            range(LOG_N + 1),
            radius,
            key=lambda k: certified_radius(clopper_pearson_lower(k, LOG_N, LOG_ALPHA), sigma),
        )
        return min(k, LOG_N) / LOG_N

    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    return [share(float(line["radius"])) if line["predict"] != "-1" else 0.5 for line in lines]


def print_log(path: Path, sigma: float, others: int, n: int, alpha: float) -> None:
    """Print a table: a line for the targets sigma and 2 sigma."""
    probabilities = logged_probabilities(path, sigma)
    print(f"{path.name}: {len(probabilities)} images, n {n}, alpha {alpha:g}, {others} others")
    print(
        "| target | mean rows | fewer rows | fixed n certifies | of these | hopeless | all rows |"
    )
    print("|---|---|---|---|---|---|---|")
    for target in (1.0, 2.0):
        found = simulate(probabilities, others, target, n, alpha)
        mean, ended = N0 + found.rows.mean(), Counter(found.ended)
        kept = (found.reached & found.fixed).sum() / found.fixed.sum()
        print(
            f"| {target * sigma:g} | {mean:.0f} | {(FIXED_N0 + n) / mean:.1f} "
            f"| {found.fixed.sum()} | {kept:.2%} "
            f"| {ended[Decision.HOPELESS]} | {ended[Decision.END]} |"
        )


def main() -> None:
    """Print a table: a line for every p and target, or those of a log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--others", type=int, default=1, help="classes that share the other votes")
    parser.add_argument("--log", type=Path, help="a published certification log of 100,000 rows")
    parser.add_argument("--sigma", type=float, default=0.25, help="that of the log")
    arguments = parser.parse_args()
    n, alpha = arguments.n, arguments.alpha
    if arguments.log:
        print_log(arguments.log, arguments.sigma, arguments.others, n, alpha)
        return
    print(f"n {n}, alpha {alpha:g}, {arguments.runs} runs, {arguments.others} other classes")
    print("| p | p0 | target | mean rows | n / mean | reached | hopeless | all rows |")
    print("|---|---|---|---|---|---|---|---|")
    for p, p0 in itertools.product(PROBABILITIES, TARGETS):
        target = float(ndtri(p0))
        check_anytime(N0, n, SIGMA, alpha, target)
        mean, ended, reached = rows_of(p, arguments.others, target, n, alpha, arguments.runs)
        hopeless, last = (ended[end] / arguments.runs for end in ("hopeless", "end"))
        print(
            f"| {p:g} | {p0:g} | {target:.3f} | {mean:.0f} | {n / mean:.1f} | {reached:.3f} "
            f"| {hopeless:.3f} | {last:.3f} |"
        )


if __name__ == "__main__":
    main()
