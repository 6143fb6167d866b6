"""Tasks to evaluate behind a server: from labeled files to records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from models.evaluation.records import Record
from service.cli.evaluation.images import LabeledFile
from service.cli.evaluation.tasks import Question, Setting
from service.client import Client, InvalidRequest


class RemoteTask:
    """A task of a server, which computes `at_once` images at a time."""

    def __init__(self, name: str, client: Client, at_once: int) -> None:
        """Raises ValueError for a task that the server does not have, ProblemError and Unreachable
        as the client does.
        """
        models = client.models()
        found = [each for each in models if name in (each["task"], each["name"])]
        if len(found) != 1:
            known = ", ".join(each["name"] or each["task"] for each in models)
            raise ValueError(f"the server has {len(found)} tasks {name!r}: it has {known}")
        (model,) = found
        self.name, self.id = name, model["task"]
        self.labels, self.resolution = model["labels"], model["resolution"]
        self.largest_sigma = model["largest_sigma"]
        self._artifact = model["id"]
        self._client, self._at_once = client, at_once

    def settings(self, setting: Setting, question: Question) -> Mapping[str, Any]:
        """As in `Task`; the noise is the server's, so there is no seed."""
        asked = asdict(question)
        del asked["seed"]
        return {
            "task": self.name,
            "id": self._artifact,
            "classes": len(self.labels),
            "resolution": self.resolution,
            "sigma": setting.sigma,
            **asked,
        }

    def records(
        self, files: Sequence[LabeledFile], setting: Setting, question: Question
    ) -> Iterator[Record]:
        """As in `Task`, in the order in which the answers arrive.

        Raises ProblemError and Unreachable as the client does; what is queued is then dropped.
        """
        with ThreadPoolExecutor(self._at_once, "evaluate") as pool:
            asked = [pool.submit(self._answer, file, setting, question) for file in files]
            try:
                for answer in as_completed(asked):
                    yield answer.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, file: LabeledFile, setting: Setting, question: Question) -> Record:
        began = time.perf_counter()
        try:
            answer = self._client.predict(
                file.read(),
                task=self.id,
                sigma=setting.sigma,
                alpha=question.alpha,
                n0=question.n0,
                n=question.n,
                method=question.method,
            )
        except InvalidRequest as problem:
            raise ValueError(f"{file.name}: {problem}") from problem
        label = answer["label_index"]
        counts = {self.labels.index(vote["label"]): vote["count"] for vote in answer["counts"]}
        return Record(
            file.index, file.name, self.labels.index(file.label),
            -1 if label is None else label, answer["radius"] or 0.0, counts, None,
            time.perf_counter() - began, answer["bundle"],
        )  # fmt: skip
