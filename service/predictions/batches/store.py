"""Batches as folders on disk: the questions, the images that wait, and a line an answered image.

The folder `ID/RUN` of a batch holds `batch.json` (replaced at its end), `images/` and `lines/` (a
file an image, by index), and `jobs` (an id a line). `ID` appears and vanishes by one rename, so a
process may be killed at any point. The line of an image replaces its file. `RUN` is random: a
process that still works on a deleted batch finds nothing of a later one with the same id.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from models.files import flush, written_whole
from service.config import Settings
from service.engine.protocol import RETRY_SECONDS
from service.errors import Backlog, NotFound, QuotaExceeded
from service.jobs import State
from service.predictions.question import PredictRequest

MOST_OPEN = 20
"""Most batches that may be open at once; one key may have half."""
HALF_MADE_SECONDS = 3_600.0
"""Age at which a half-made folder is the leftover of a killed process."""
_BATCH, _IMAGES, _LINES, _JOBS = "batch.json", "images", "lines", "jobs"
_PARTIAL, _TRASH = ".partial-", ".trash-"
_ID = re.compile(r"[A-Za-z0-9_-]{22}")


@dataclass(frozen=True, slots=True)
class Batch:
    """One question about each of several images.

    - `fields`: the question's fields without the image; its `alpha` is the share of one image.
    - `family_alpha`: the probability that any statement of the batch is wrong.
    - `names`: the images' file names, by index.
    - `created`, `finished`: Unix seconds; `finished` is None for an open batch.
    - `state`: the state as stored. A batch is `queued` there until its end.
    - `problem`: the first image's problem document where no image has an answer.
    - `fingerprint`: SHA-256 (hex) of the request, where it had an Idempotency-Key.
    - `run`: the name of the batch's own folder; a later batch of the same id has another.
    """

    id: str
    owner: str | None
    created: float
    family_alpha: float
    fields: Mapping[str, Any]
    names: Sequence[str]
    state: State = State.QUEUED
    finished: float | None = None
    problem: Mapping[str, Any] | None = None
    fingerprint: str = ""
    run: str = field(default_factory=lambda: secrets.token_urlsafe(16))

    def question(self, image: bytes) -> PredictRequest:
        """The batch's question about one of its images."""
        return PredictRequest.model_validate({**self.fields, "image": image})


class BatchStore:
    """The batches under the data directory; its methods block on the disk.

    Methods that read or change a batch raise FileNotFoundError once its folder is gone.
    """

    def __init__(self, settings: Settings) -> None:
        self._root = settings.data_dir.resolve() / "batches"
        self._retention_seconds = settings.retention_seconds
        self._ended: set[Path] = set()  # Spares `open` reading them again.

    def create(self, batch: Batch, images: Sequence[IO[bytes]]) -> None:
        """Store a new batch with its images, one a name.

        Raises FileExistsError where there is a batch of this id, Backlog where MOST_OPEN batches
        are open, and QuotaExceeded where the owner has half of that.
        """
        if (self._root / batch.id).exists():
            raise FileExistsError(batch.id)
        for folder in (self._root.parent, self._root):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_room(batch.owner)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self._root))
        try:
            folder = partial / batch.run
            for each in (folder, folder / _IMAGES, folder / _LINES):
                each.mkdir(mode=0o700)
            for index, image in enumerate(images):
                with (folder / _IMAGES / str(index)).open("wb") as stream:
                    shutil.copyfileobj(image, stream)
                flush(folder / _IMAGES / str(index))
            _write(folder, batch)
            for each in (folder / _IMAGES, folder, partial):
                flush(each)
            partial.rename(self._root / batch.id)
            flush(self._root)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(batch.id) from error  # By another process, meanwhile.
            raise

    def get(self, batch_id: str) -> Batch:
        """The batch of this id; raises NotFound, also for one that another release has written."""
        folders = self._folders_of(batch_id) if _ID.fullmatch(batch_id) else []
        for batch in _read(folders):
            return batch
        raise NotFound("There is no such batch, or no longer")

    def open(self) -> list[Batch]:
        """The batches that have not ended, the oldest first."""
        folders = set(self._folders())
        self._ended &= folders
        found = _read(folders - self._ended)
        self._ended |= {self._folder(batch) for batch in found if batch.state.ended}
        return sorted((each for each in found if not each.state.ended), key=_created)

    def has_begun(self, batch: Batch) -> bool:
        """Whether any of the batch's jobs was queued."""
        return (self._folder(batch) / _JOBS).exists()

    def image(self, batch: Batch, index: int) -> bytes:
        """The file of an image without a line; raises FileNotFoundError for another."""
        return (self._folder(batch) / _IMAGES / str(index)).read_bytes()

    def add_job(self, batch: Batch, job_id: str) -> None:
        """Note a job of the batch, so that it is deleted with the batch."""
        with (self._folder(batch) / _JOBS).open("a", encoding="ascii") as stream:
            stream.write(f"{job_id}\n")

    def add_line(self, batch: Batch, index: int, line: bytes) -> None:
        """Store an image's line, and remove the image."""
        folder = self._folder(batch)
        with written_whole(folder / _LINES / str(index)) as partial:
            partial.write_bytes(line)
        (folder / _IMAGES / str(index)).unlink(missing_ok=True)

    def done(self, batch: Batch) -> set[int]:
        """The indices of the images that have a line."""
        names = [path.name for path in (self._folder(batch) / _LINES).iterdir()]
        return {int(name) for name in names if name.isdecimal()}

    def line(self, batch: Batch, index: int) -> bytes:
        """The line of an image; up to 4 MB, for a task of 1,000 long labels."""
        return (self._folder(batch) / _LINES / str(index)).read_bytes()

    def lines(self, batch: Batch) -> Iterator[bytes]:
        """The lines so far, in the order of the images, one in memory at a time."""
        return (self.line(batch, index) for index in sorted(self.done(batch)))

    def finish(self, batch: Batch) -> None:
        """Store the batch's end, once every image has a line."""
        if len(self.done(batch)) < len(batch.names):
            return
        lines = map(json.loads, self.lines(batch))
        first = next(lines)
        is_answered = "result" in first or any("result" in line for line in lines)
        state = State.SUCCEEDED if is_answered else State.FAILED
        problem = None if is_answered else first["problem"]
        ended = replace(batch, state=state, finished=time.time(), problem=problem)
        _write(self._folder(batch), ended)

    def discard(self, batch_id: str) -> None:
        """Remove the batch's images and lines; its jobs are in `discarded` until it is erased."""
        trash = self._root / f"{_TRASH}{batch_id}-{time.time_ns()}"
        (self._root / batch_id).rename(trash)
        flush(self._root)
        for name in (_IMAGES, _LINES):
            for folder in trash.glob(f"*/{name}"):
                shutil.rmtree(folder, ignore_errors=True)

    def discard_old(self) -> None:
        """Discard batches past their time, and half-made folders of killed processes."""
        now = time.time()
        for batch in _read(self._folders()):
            if (batch.finished or batch.created) + self._retention_seconds < now:
                with suppress(FileNotFoundError):  # Another process does the same.
                    self.discard(batch.id)
        for partial in self._root.glob(f"{_PARTIAL}*"):
            with suppress(FileNotFoundError):
                if partial.stat().st_mtime + HALF_MADE_SECONDS < now:
                    shutil.rmtree(partial, ignore_errors=True)

    def discarded(self) -> dict[Path, list[str]]:
        """The discarded folders, each with the ids of its jobs."""
        found: dict[Path, list[str]] = {}
        for trash in self._root.glob(f"{_TRASH}*"):
            found[trash] = []
            with suppress(FileNotFoundError):  # Another process erases it.
                for jobs in trash.glob(f"*/{_JOBS}"):
                    found[trash] += jobs.read_text("ascii").split()
        return found

    def erase(self, trash: Path) -> None:
        """Remove a discarded folder."""
        shutil.rmtree(trash, ignore_errors=True)

    def _check_room(self, owner: str | None) -> None:
        owners = [batch.owner for batch in self.open()]
        if owner is not None and owners.count(owner) >= MOST_OPEN // 2:
            raise QuotaExceeded(
                f"This key has {owners.count(owner)} open batches; at most {MOST_OPEN // 2} may be",
                retry_after=RETRY_SECONDS,
                limit=MOST_OPEN // 2,
            )
        if len(owners) >= MOST_OPEN:
            raise Backlog(
                f"{len(owners)} batches are open; at most {MOST_OPEN} may be",
                retry_after=RETRY_SECONDS,
                limit=MOST_OPEN,
            )

    def _folder(self, batch: Batch) -> Path:
        return self._root / batch.id / batch.run

    def _folders(self) -> list[Path]:
        """The folders of all batches."""
        entries = self._root.iterdir() if self._root.is_dir() else ()
        ids = [path.name for path in entries if _ID.fullmatch(path.name)]
        return [folder for batch_id in ids for folder in self._folders_of(batch_id)]

    def _folders_of(self, batch_id: str) -> list[Path]:
        """The one folder of a batch, or none."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return [*(self._root / batch_id).iterdir()]
        return []


def _read(folders: Iterable[Path]) -> list[Batch]:
    """The batches in these folders, but those discarded meanwhile, or of another release."""
    found = []
    for folder in folders:
        with suppress(FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
            fields = json.loads((folder / _BATCH).read_text("utf-8"))
            found.append(Batch(**{**fields, "state": State(fields["state"])}))
    return found


def _created(batch: Batch) -> tuple[float, str]:
    return batch.created, batch.id


def _write(folder: Path, batch: Batch) -> None:
    with written_whole(folder / _BATCH) as partial:
        partial.write_text(json.dumps(asdict(batch), allow_nan=False), "utf-8")
