"""The command `audit`: looks for reused noise in a certification log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from service.cli.console import tell
from service.cli.predict import Alpha

if TYPE_CHECKING:
    from models.evaluation.logs.audit import Audit


def audit(
    log: Annotated[Path, typer.Argument(help="A log in the columns of Cohen et al.")],
    n: Annotated[int, typer.Option("--n", help="Estimation rows of an image.")],
    sigma: Annotated[float, typer.Option(help="Noise strength, pixels in [0,1].")],
    alpha: Alpha = 0.001,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Look for reused noise in a certification log, and print what would remain of its table.

    Exits with 0 if nothing is found, with 1 if reused noise is found, and with 2 for a log or an
    option that cannot be used.
    """
    from models.evaluation.logs.audit import audit as audited
    from models.evaluation.logs.reading import read_log

    try:
        found = audited(read_log(log), n, sigma, alpha)
    except ValueError as error:
        tell(error)
        raise typer.Exit(2) from error
    if as_json:
        settings = {"log": str(log), "n": n, "sigma": sigma, "alpha": alpha}
        print(json.dumps(settings | _document(found), indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for sentence in _sentences(found, n):
            console.print(sentence)
        console.print(_table(found, n))
    if found.found:
        raise typer.Exit(1)


def _document(audit: Audit) -> dict[str, Any]:
    return {
        "images": audit.images,
        "certified": audit.certified,
        "full": audit.inversion.full,
        "ambiguous": audit.inversion.ambiguous,
        "inconsistent": audit.inversion.inconsistent,
        "found": audit.found,
        "conclusive": audit.conclusive,
        "factor": audit.factor,
        "effective_n": audit.effective_n,
        "p_value": audit.p_value,
        "least_p_value": audit.least_p_value,
        "missing": list(audit.missing),
        "tests": [test._asdict() for test in audit.tests],
        "printed": _figures(audit.printed.certified, audit.printed.average_certified_radius),
        "remaining": audit.remaining
        and _figures(audit.remaining.certified, audit.remaining.average_certified_radius),
    }


def _figures(certified: dict[float, float], average: float) -> dict[str, Any]:
    return {"certified": {f"{e:g}": share for e, share in certified.items()}, "ACR": average}


def _sentences(audit: Audit, n: int) -> list[str]:
    """What was read, what was found, and what follows from it."""
    from models.evaluation.logs.audit import LEVEL

    read = audit.inversion
    sentences = [
        f"{audit.images} images: {audit.certified} certified, {read.full} with all {n} votes.",
        f"Radii with one count: {audit.certified - read.ambiguous - read.inconsistent}; "
        f"with several: {read.ambiguous}; with none: {read.inconsistent}.",
    ]
    if not audit.found:
        sentences.append(
            f"Nothing found: p = {audit.p_value:.2g} over {len(audit.tests)} factors; a finding "
            f"needs {LEVEL}."
        )
        if read.full == 0:
            sentences.append(f"No image has all {n} votes, so check n and sigma.")
        if not audit.conclusive:
            sentences.append("The log has too few near-full tallies to show reused noise.")
        return sentences
    test = next(test for test in audit.tests if test.factor == audit.factor)
    sentences += [
        f"Reused noise found: of {test.tallies} readable tallies that miss 1 to {test.window} "
        f"votes, {test.multiples} miss a multiple of {test.factor}.",
        f"Independent rows do so with probability at most {test.chance:.3f} each: "
        f"p = {audit.p_value:.2g} over {len(audit.tests)} factors.",
        f"Effective n: {audit.effective_n} of {n}.",
    ]
    if audit.missing:
        counts = ", ".join(map(str, audit.missing))
        sentences.insert(3, f"No image has {counts} votes.")
    return sentences


def _table(audit: Audit, n: int) -> Table:
    """Certified accuracy and ACR, as printed and with the effective n."""
    table = Table("", *(f"{epsilon:g}" for epsilon in audit.printed.certified), "ACR",
                  title="Certified accuracy in percent, by l2 radius")  # fmt: skip
    lines = [(f"as printed, n = {n}", audit.printed)]
    if audit.remaining:
        lines.append((f"with n = {audit.effective_n}", audit.remaining))
    for name, each in lines:
        shares = (f"{100 * share:.1f}" for share in each.certified.values())
        table.add_row(name, *shares, f"{each.average_certified_radius:.3f}")
    return table
