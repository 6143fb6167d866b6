"""Simulated rows of early stopping: `python -m benchmarks.anytime_rows`.

For images whose class has probability p, and targets Phi^-1(p0) sigma: the mean number of
estimation rows, and how they ended. Seeded, so a run repeats itself to the row. Votes that are not
for the class go to one rival, or evenly to as many classes as `--others` says.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections import Counter

import numpy as np
from scipy.special import ndtri

from models.anytime import Anytime, Decision, at_look, certify_anytime, check_anytime, look_schedule

PROBABILITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
TARGETS = (0.6, 0.7, 0.8, 0.9, 0.95)
SIGMA, N0, SEED = 1.0, 16, 0


def rows_of(
    p: float, others: int, target: float, n: int, alpha: float, runs: int
) -> tuple[float, Counter[str], float]:
    """Mean rows, how the runs ended, and the share of runs whose target was reached."""
    random = np.random.default_rng(SEED)
    looks = look_schedule(n, SIGMA, alpha, target)
    shares = np.array([p, *[(1.0 - p) / others] * others])

    def question(rows: int) -> Anytime:
        return Anytime(SIGMA, alpha, N0, n, target, (rows,), 0.0)

    # An earlier look that reached the target has ended the run, so that one look decides.
    @functools.cache
    def decide(rows: int, k: int, most: int) -> tuple[Decision, bool]:
        votes = [k, most]
        while rest := rows - sum(votes):
            votes.append(min(rest, most))
        selection = [N0] + [0] * (len(votes) - 1)
        decision = at_look(question(rows), selection, [votes])
        if decision is not Decision.END:
            return decision, decision is Decision.REACHED
        return decision, bool(certify_anytime(question(rows), selection, [votes]).target_reached)

    drawn, reached, ended = 0, 0, Counter[str]()
    votes = np.zeros((runs, len(shares)), np.int64)
    for before, rows in itertools.pairwise((0, *looks)):
        votes += random.multinomial(rows - before, shares, len(votes))
        drawn += (rows - before) * len(votes)
        pairs = zip(votes[:, 0].tolist(), votes[:, 1:].max(axis=1).tolist(), strict=True)
        decisions = list(itertools.starmap(functools.partial(decide, rows), pairs))
        reached += sum(won for _, won in decisions)
        ended.update(decision for decision, _ in decisions if decision is not Decision.CONTINUE)
        votes = votes[[decision is Decision.CONTINUE for decision, _ in decisions]]
    return drawn / runs, ended, reached / runs


def main() -> None:
    """Print a table: a line for every p and target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--others", type=int, default=1, help="classes that share the other votes")
    arguments = parser.parse_args()
    n, alpha = arguments.n, arguments.alpha
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
