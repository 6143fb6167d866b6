"""Per-image records of an evaluation in files, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import floor
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Protocol, Self, TextIO, TypeVar

from models.files import written_whole

COUNTS_SUFFIX = ".counts.jsonl"


class Line(Protocol):
    """A dataclass with one image's outcome, which a log keeps as a line of `HEADER`'s columns."""

    HEADER: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def index(self) -> int:
        """The image's place in the data set."""

    def line(self) -> str:
        """The image's line in the log."""

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """The outcome from its stored fields; raises TypeError or KeyError for others."""


Outcome = TypeVar("Outcome", bound=Line)


@dataclass(frozen=True, slots=True)
class Record:
    """One image's outcome under one setting.

    `index` is the image's place in the data set, `truth` its label's index in the task. `predict`
    is -1 and `radius` (l2, [0,1] pixel units) 0.0 for an abstention. `estimation` are the votes by
    label index; `selection` alike, None where a server did not return them. `bundle` is the served
    digest.
    """

    index: int
    name: str
    truth: int
    predict: int
    radius: float
    estimation: Mapping[int, int]
    selection: Mapping[int, int] | None
    seconds: float
    bundle: str

    HEADER: ClassVar[str] = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    """The columns of Cohen et al.'s logs; `predict` is -1 for an abstention."""

    @property
    def correct(self) -> bool:
        """Whether the certified label is the true one; an abstention is not."""
        return self.predict == self.truth

    @property
    def majority(self) -> int:
        """The label with most estimation votes, whether or not it is certified."""
        return max(self.estimation, key=lambda label: (self.estimation[label], -label))

    def line(self) -> str:
        """The image's line in a log; the radius is rounded down."""
        radius = floor(self.radius * 1e6) / 1e6
        return (
            f"{self.index}\t{self.truth}\t{self.predict}\t{radius:.6f}\t{int(self.correct)}"
            f"\t{self.seconds:.3f}\n"
        )

    @classmethod
    def read(cls, document: dict[str, Any]) -> Self:
        """See `Line`."""
        for name in ("estimation", "selection"):
            if document[name] is not None:
                document[name] = by_label(document[name])
        return cls(**document)


def by_label(votes: Mapping[str, int]) -> dict[int, int]:
    """Stored votes by label index, whose keys JSON has turned into strings."""
    return {int(label): count for label, count in votes.items()}


class OutcomeFile(Generic[Outcome]):
    """The outcomes of one setting, of one `kind`: the log `PATH.tsv`, and the counts beside it.

    The file of counts is the truth. Its first line has the `settings`; a last line that a kill cut
    short is dropped. Leaving the block without an error sorts the log by index.

    Raises ValueError, naming the setting, for a file with other settings, and for a line in it that
    is no record.
    """

    def __init__(self, kind: type[Outcome], path: Path, settings: Mapping[str, Any]) -> None:
        self._kind = kind
        self.log = path.with_name(f"{path.name}.tsv")
        self.counts = path.with_name(f"{path.name}{COUNTS_SUFFIX}")
        self.records: dict[int, Outcome] = {}
        self._settings = json.loads(json.dumps(settings))
        if self.counts.exists():
            self._read()
        stored = map(_stored, self.sorted())
        _write(self.counts, "".join([_json(self._settings), *stored]))
        self._write_log()
        self._streams: list[TextIO] = []

    def __enter__(self) -> Self:
        self._streams = [self.counts.open("a"), self.log.open("a")]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams:
            stream.close()
        if error is None:
            self._write_log()

    def add(self, record: Outcome) -> None:
        """Keep a record: its counts first, so that a log's line always has its counts."""
        self.records[record.index] = record
        for stream, line in zip(self._streams, (_stored(record), record.line()), strict=True):
            stream.write(line)
            stream.flush()

    def _read(self) -> None:
        lines = self.counts.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if not whole:
            return
        try:
            settings, *documents = map(json.loads, whole)
            for document in documents:
                record = self._kind.read(document)
                self.records[record.index] = record
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.counts}: is no file of counts: {error}") from error
        for name, wanted in self._settings.items():
            if (found := settings.get(name)) != wanted:
                raise ValueError(
                    f"{self.counts} has {name} = {found}, and the run has {wanted}: "
                    "choose another --out"
                )

    def sorted(self) -> list[Outcome]:
        """The records by index."""
        return [self.records[index] for index in sorted(self.records)]

    def _write_log(self) -> None:
        _write(self.log, "".join([self._kind.HEADER, *(record.line() for record in self.sorted())]))


class RecordFile(OutcomeFile[Record]):
    """The certified records of one setting; see `OutcomeFile`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(Record, path, settings)


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text)
        partial.chmod(0o644)


def _json(document: object) -> str:
    return json.dumps(document, ensure_ascii=False) + "\n"


def _stored(record: Line) -> str:
    return _json(asdict(record))
