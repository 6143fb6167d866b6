"""Many pictures and one question: which pictures, with which alpha, and a file of the answers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from .errors import problem_of
from .types import PredictResponse

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
COLUMNS = ("name", "label", "certified", "radius", "abstained", "error")


class Answer(NamedTuple):
    """A picture's answer, or the error in its place."""

    name: str
    answer: PredictResponse | None
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Questions:
    """The pictures, and the question about each."""

    paths: list[Path]
    question: dict[str, Any]

    @classmethod
    def of(
        cls,
        images: str | Path | Iterable[str | Path],
        family_alpha: float | None,
        question: Mapping[str, Any],
        as_batch: bool,
    ) -> Self:
        """The question has each picture's share of family_alpha; `as_batch` it has all of it.

        Raises ValueError for no pictures, for alpha beside family_alpha, and for a batch without
        family_alpha.
        """
        if isinstance(images, str | Path):
            folder = Path(images)
            found = sorted(folder.iterdir()) if folder.is_dir() else [folder]
            paths = [path for path in found if path.suffix.lower() in SUFFIXES]
        else:
            paths = [Path(image) for image in images]
        if not paths:
            raise ValueError(f"images = {images}: there is no picture; one needs {SUFFIXES}")
        if family_alpha is None:
            if as_batch:
                raise ValueError("manifest needs family_alpha, the alpha of all pictures together")
            return cls(paths, dict(question))
        if question.get("alpha") is not None:
            raise ValueError("alpha and family_alpha exclude each other")
        if as_batch:
            return cls(paths, {**question, "alpha": family_alpha})
        from models.certificates.alpha import family_share

        return cls(paths, {**question, "alpha": family_share(family_alpha, len(paths))})

    def files(self) -> list[tuple[str, tuple[str, bytes]]]:
        """The files of a batch's form; raises OSError for an unreadable one."""
        return [("images", (path.name, path.read_bytes())) for path in self.paths]

    def answer(self, line: str) -> Answer:
        """The answer in a line of a batch's results."""
        found = json.loads(line)
        name, problem = str(self.paths[found["index"]]), found.get("problem")
        if problem is None:
            return Answer(name, found["result"], None)
        return Answer(name, None, problem_of(int(problem["status"]), problem))


@contextmanager
def saving(out: str | Path | None) -> Iterator[Callable[[Answer], None]]:
    """A function that adds an answer to the file; raises ValueError for an unknown suffix."""
    if out is None:
        yield lambda answer: None
        return
    suffix = Path(out).suffix
    if suffix not in (".jsonl", ".csv"):
        raise ValueError(f"out = {out}: must end in .jsonl or .csv")
    with Path(out).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if suffix == ".csv":
            writer.writeheader()

        def save(found: Answer) -> None:
            error = "" if found.error is None else str(found.error)
            answer: Mapping[str, Any] = found.answer or {}
            line = {**answer, "name": found.name, "error": error}
            if suffix == ".csv":
                writer.writerow(line)
            else:
                file.write(json.dumps(line) + "\n")
            file.flush()

        yield save
