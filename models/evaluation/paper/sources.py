"""Logs by the names that tables give them: DATASET/RUN, as `imagenet/ours-0.25`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.certificates.evidence import total_variation
from models.evaluation.logs.reading import Answer, has_radii, read_answers, read_log
from models.evaluation.records import COUNTS_SUFFIX, Record
from models.evaluation.results import RULES, Run, by_rule

COHEN, TWO_SIDED = "cohen", "two-sided"


@dataclass(frozen=True, slots=True)
class Log:
    """The answers of one log, and by rule its certified images; none of attacks or without noise.

    A log without vote counts beside it has the radii of its file alone, and they count as Cohen's.
    """

    answers: Sequence[Answer]
    certified: Mapping[str, Run]


def read_logs(arguments: Iterable[str]) -> dict[str, Log]:
    """The logs that the arguments name.

    Each is a folder of logs, a log, or DATASET/RUN=LOG. Without a name, DATASET is the folder of
    the file and RUN its stem, less a leading `DATASET-`. Raises ValueError for a folder without a
    log, two logs of one name, and a file that is no log; OSError for one that cannot be read.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        for name, path in _named(argument):
            if name in found:
                raise ValueError(f"{found[name]} and {path} are both {name}: give one of them")
            found[name] = path
    return {name: _read(name, path) for name, path in found.items()}


def _named(argument: str) -> list[tuple[str, Path]]:
    name, equals, file = argument.partition("=")
    if equals and not Path(argument).exists():
        if name.count("/") != 1 or not all(name.split("/")):
            raise ValueError(f"{argument}: the name {name!r} must be DATASET/RUN")
        return [(name, Path(file))]
    path = Path(argument)
    paths = sorted(path.glob("*.tsv")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"{argument}: the folder has no .tsv")
    return [(_name(each), each) for each in paths]


def _name(path: Path) -> str:
    dataset = path.resolve().parent.name
    return f"{dataset}/{path.stem.removeprefix(f'{dataset}-')}"


def _read(name: str, path: Path) -> Log:
    if not has_radii(path):
        return Log(read_answers(path), {})
    lines = read_log(path)
    counts = path.with_name(path.stem + COUNTS_SUFFIX)
    if counts.exists():
        return Log(lines, _counted(name, counts))
    records = [
        Record(
            line.index, "", line.truth, line.predict, float(line.radius), {}, None,
            line.seconds, "",
        )
        for line in lines
    ]  # fmt: skip
    return Log(lines, {COHEN: Run(name, {}, records)})


def _counted(name: str, path: Path) -> dict[str, Run]:
    """The run of a file of counts by rule; raises ValueError for a file that is none."""
    try:
        settings, *documents = map(json.loads, path.read_text().splitlines())
        run = Run(name, settings, [Record.read(document) for document in documents])
        if settings.get("sigma") is None:
            return {}
        side = settings["resolution"]
        blur = total_variation((3, side, side), settings["sigma"])
        ruled = {rule: by_rule(run, rule, blur) for rule in RULES}
        certified = {rule: other for rule, other in ruled.items() if other is not None}
        return certified or {settings["method"]: run}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is no file of counts: {error}") from error
