"""Rows that certificates cost by rule, as Markdown: `python -m benchmarks.rule_table < JSON`.

The JSON is what `vouchsafe bench certificates` prints.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Print the table."""
    print("| target radius | rule | certified | of those of two-sided | mean rows | times fewer |")
    print("|---" * 6 + "|")
    for target, by_rule in json.load(sys.stdin)["at a target radius"].items():
        for rule, found in by_rule.items():
            print(
                f"| {target} | {rule} | {found['certified']} | {found['of those of two-sided']} "
                f"| {found['mean rows']:,.0f} | {found['times fewer rows']:.1f} |"
            )


if __name__ == "__main__":
    main()
