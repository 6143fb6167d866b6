"""The results of an evaluation as a document, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from models.certificates.evidence import total_variation
from models.evaluation.results import RULES, Run, by_rule, compared, figures
from models.evaluation.scores import EPSILONS
from models.files import written_whole
from service.cli.console import errors

RESULTS, TABLE, CURVE = "results.json", "table.md", "curve"


def results(runs: Sequence[Run], images: Mapping[str, Any]) -> dict[str, Any]:
    """The document of the runs: figures of each, by rule where votes allow, and comparisons.

    Runs of another task or baseline are compared with the first task's at the same sigma, its
    other runs with the first.
    """
    found = {}
    for run in runs:
        own = figures(run)
        if run.certifies and run.records[0].selection is not None:
            own["by rule"] = {rule: _by_rule(run, rule) for rule in RULES}
        found[run.name] = own
    return {
        "images": dict(images),
        "runs": found,
        "compared": [compared(_base(runs, run), run) for run in runs[1:]],
    }


def _by_rule(run: Run, rule: str) -> dict[str, Any]:
    side = run.settings["resolution"]
    other = by_rule(run, rule, total_variation((3, side, side), run.settings["sigma"]))
    assert other is not None  # noqa: S101 - the caller has seen the selection votes
    found = figures(other)
    return {name: found[name] for name in ("certified", "ACR", "abstentions")}


def _base(runs: Sequence[Run], run: Run) -> Run:
    first = runs[0]
    same = (
        each
        for each in runs
        if each is not run
        and _of(each) == _of(first)
        and each.settings.get("sigma") == run.settings.get("sigma")
    )
    return first if _of(run) == _of(first) else next(same, first)


def _of(run: Run) -> tuple[str, str | None]:
    return run.settings["task"], run.settings.get("baseline")


def write(runs: Sequence[Run], document: Mapping[str, Any], out: Path) -> list[Path]:
    """Write results.json, the table, and the curve as PNG and SVG; without matplotlib no curve."""
    files = [out / RESULTS, out / TABLE]
    for file, text in zip(
        files, (json.dumps(document, indent=2) + "\n", markdown(document)), strict=True
    ):
        with written_whole(file) as partial:
            partial.write_text(text)
            partial.chmod(0o644)
    from models.evaluation.pictures.curves import draw

    try:
        files += draw(runs, out / CURVE)
    except ImportError as error:
        errors.print(f"no curve is drawn ({error}): pip install '.[torch]' in the checkout")
    return files


def rows(document: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The table's lines: a quantity, and its value and 95 % interval in each run."""
    runs = list(document["runs"].values())
    lines = [
        ("images", [str(run["images"]) for run in runs]),
        ("clean", [_percent(run["clean"]) for run in runs]),
        *(
            (f"certified at {e:g}", [_percent(_certified(run, e)) for run in runs])
            for e in EPSILONS
        ),
        ("ACR", [_number(run.get("ACR")) for run in runs]),
        ("abstentions", [_percent(run.get("abstentions")) for run in runs]),
        ("p_A, 5 / 50 / 95 % of images", [_quantiles(run.get("p_A")) for run in runs]),
        *(
            (f"ACR, {rule}", [_number(run.get("by rule", {}).get(rule, {}).get("ACR"))
                              for run in runs])
            for rule in RULES
        ),
        *_attack_rows(runs),
    ]  # fmt: skip
    return [(name, cells) for name, cells in lines if any(cells)]


def _attack_rows(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The lines of attacks: what each leaves at each eps, and what is certified at other eps."""
    attacks = [run.get("attacks", {}) for run in runs]
    named = [own.get("by attack", {}) for own in attacks]
    lines = [("empirical clean", [_percent(own.get("empirical clean")) for own in attacks])]
    for name, eps in dict.fromkeys((a, e) for own in named for a in own for e in own[a]):
        found = [own.get(name, {}).get(eps, {}) for own in named]
        robust = [_percent(each.get("robust")) for each in found]
        lines.append((f"robust to {name} at {eps}", robust))
        if float(eps) not in EPSILONS:
            certified = [_percent(each.get("certified")) for each in found]
            lines.append((f"certified at {eps}, beside {name}", certified))
    contradictions = [
        [len(each["contradicted"]) for by_eps in own.values() for each in by_eps.values()
         if "contradicted" in each]
        for own in named
    ]  # fmt: skip
    totals = [str(sum(own)) if own else "" for own in contradictions]
    return [*lines, ("certificates contradicted", totals)]


def differences(document: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The comparisons' lines: a quantity, and its difference and 95 % interval in each."""
    pairs = document["compared"]
    names = ["clean", *(f"certified at {e:g}" for e in EPSILONS)]
    return [
        *((name, [_percent(pair.get(name), "+") for pair in pairs]) for name in names),
        ("ACR", [_number(pair.get("ACR"), "+") for pair in pairs]),
    ]


def tables(document: Mapping[str, Any]) -> list[Table]:
    """The results and the comparisons for a terminal."""
    caption = (
        "Percent, and radii in l2 of pixels in [0,1], with 95 % intervals: Wilson's of shares, "
        "bootstrapped of ACR. Certified means stable, and counted here only where right."
    )
    shown = [_table(_source(document), list(document["runs"]), rows(document), caption)]
    if document["compared"]:
        caption = "Differences on the same images, with paired bootstrap intervals."
        shown.append(_table("", _pairs(document), differences(document), caption))
    return shown


def markdown(document: Mapping[str, Any]) -> str:
    """The results and the comparisons as Markdown."""
    parts = [_source(document) + "\n", _markdown(list(document["runs"]), rows(document))]
    if document["compared"]:
        parts.append(_markdown(_pairs(document), differences(document)))
    return "\n".join(parts)


def _source(document: Mapping[str, Any]) -> str:
    images = document["images"]
    return f"{images['source']}: {images['images']} of {images['of']} images"


def _pairs(document: Mapping[str, Any]) -> list[str]:
    return [f"{pair['after']} - {pair['before']}" for pair in document["compared"]]


def _table(
    title: str, heads: Sequence[str], lines: Sequence[tuple[str, list[str]]], caption: str
) -> Table:
    first = Column(min_width=len("abstentions"))
    table = Table(first, *heads, title=title, caption=caption)
    for name, cells in lines:
        table.add_row(name, *cells)
    return table


def _markdown(heads: Sequence[str], lines: Sequence[tuple[str, list[str]]]) -> str:
    first = "| | " + " | ".join(head.replace("|", "\\|") for head in heads) + " |"
    ruled = "|" + "---|" * (len(heads) + 1)
    rest = [f"| {name} | " + " | ".join(cells) + " |" for name, cells in lines]
    return "\n".join([first, ruled, *rest]) + "\n"


def _certified(run: Mapping[str, Any], epsilon: float) -> Mapping[str, float] | None:
    return run["certified"][f"{epsilon:g}"] if "certified" in run else None


def _percent(share: Mapping[str, float] | None, sign: str = "") -> str:
    if share is None:
        return ""
    value, low, high = (100 * share[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _number(found: Mapping[str, float] | None, sign: str = "") -> str:
    if found is None:
        return ""
    value, low, high = (found[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _quantiles(found: Mapping[str, float] | None) -> str:
    return "" if found is None else " / ".join(f"{found[q]:.2f}" for q in ("5%", "50%", "95%"))
