"""Adaptation jobs, as real processes on nano: killed anywhere, they end as if they had not been."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from models.adaptation import references, stages
from models.adaptation.plan import (
    MEASURED_ON,
    PLAN,
    STAGES,
    UNATTENDED,
    Plan,
    Status,
    write_json,
)
from models.adaptation.profiles import ADAPTATIONS
from models.adaptation.progress import Progress, problem_of
from models.adaptation.references import read_references
from models.adaptation.stages import run
from models.bundle import ADAPTER, PROMPT_STATES, TUNED, WRITERS, BundleError, read_bundle
from models.denoisers.registry import DENOISERS
from models.rows import Rows
from models.smoothing import load
from models.training import Diverged
from tests.support.fakes import FakeClock

SECONDS = 900
"""A job runs at low priority: on a busy machine it gets what others leave."""
LEVELS_APART = 5
"""Most grey levels, of 255, by which pictures in bfloat16 and in float32 differ on average."""


def job(folder: Path, **settings: int) -> Path:
    """A job's folder with a small plan."""
    folder.mkdir(parents=True)
    plan = Plan.checked(["cat", "ship"], **{"shots": 2, "steps": 60, "epochs": 2, **settings})
    described = {"plan": asdict(plan), "name": "boats", "owner": None, "created": 0.0}
    write_json(folder / PLAN, described)
    return folder


def started(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "models.adaptation.job",
        folder,
        folder.parent / "tasks",
        *more,
    ]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)  # noqa: S603


def ended(folder: Path) -> Status:
    """The job's status once its process has ended well."""
    with started(folder) as process:
        assert process.wait(SECONDS) == 0, (folder / "log.txt").read_text()
    return Status.read(folder)


def killed_in(folder: Path, stage: str) -> None:
    """Start the job and kill -9 it once it is in the stage."""
    deadline = time.monotonic() + SECONDS
    with started(folder) as process:
        while (status := Status.read(folder)).stage != stage:
            assert process.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < deadline, status
            time.sleep(0.005)
        time.sleep(0.3 if stage != "evaluating" else 0.0)
        process.send_signal(signal.SIGKILL)
        assert process.wait(SECONDS) == -signal.SIGKILL
    assert not list((folder.parent / "tasks").glob("*"))


def losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return {
        path.name: [
            (entry["step"], entry["loss"])
            for entry in map(json.loads, path.read_text().splitlines())
        ]
        for path in folder.glob("*.loss.jsonl")
    }


@pytest.mark.parametrize(
    ("killed", "steps"),
    [
        pytest.param(("personalizing",), 12, id="once"),
        pytest.param(STAGES, 60, id="in every stage", marks=pytest.mark.long),
    ],
)
def test_a_killed_job_publishes_what_an_uninterrupted_one_does(
    killed: Sequence[str], steps: int, tmp_path: Path
) -> None:
    """After each kill -9 the bundle is the same to the bit, losses and figures too; it is
    personalized and fine-tuned, loads, and votes alike each time that it is loaded."""
    whole = job(tmp_path / "whole" / "task", steps=steps)
    broken = job(tmp_path / "broken" / "task", steps=steps)
    assert ended(whole).state == "ready"
    for stage in killed:
        killed_in(broken, stage)
    status = ended(broken)
    assert (status.state, status.progress, status.stage) == ("ready", 1.0, None)
    assert losses(whole) == losses(broken)
    one, two = (read_bundle(each.parent / "tasks" / "task") for each in (whole, broken))
    assert one.manifest == two.manifest
    assert one.name == "boats"
    assert set(one.files) == {PROMPT_STATES, ADAPTER, TUNED}
    assert one.prompt == "this is a photo of a ."
    assert one.figures["references"] == 4
    assert one.figures == status.figures
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    rows = [Rows(pixels, bytes(32), 0, 32, 0.5)]
    first, again = (load(bundle).votes(rows) for bundle in (one, two))
    assert np.array_equal(first, again)


def test_a_job_ends_with_its_input_and_without_adaptation_has_the_blank_prompt(
    tmp_path: Path,
) -> None:
    """Closing standard input ends the process; with neither steps nor epochs, the bundle is the
    base networks under other labels."""
    folder = job(tmp_path / "task", steps=0, epochs=0)
    with started(folder) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(SECONDS) == 3
    assert ended(folder).state == "ready"
    bundle = read_bundle(tmp_path / "tasks" / "task")
    assert set(bundle.files) == {PROMPT_STATES}
    assert bundle.prompt == "this is a photo of a ."
    assert ended(folder).state == "ready"


def test_a_job_ends_where_its_input_falls_silent(tmp_path: Path) -> None:
    """Told how long it may go on unattended, the process works as long as it hears something."""
    folder = job(tmp_path / "task")
    with started(folder, "--silence", "5") as process:
        assert process.stdin is not None
        while Status.read(folder).stage is None:
            assert process.poll() is None
            process.stdin.write(b".")
            process.stdin.flush()
            time.sleep(0.05)
        assert process.wait(SECONDS) == UNATTENDED
    assert Status.read(folder).state == "running"


def test_a_job_begun_otherwise_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made with networks or settings that a release has changed since is thrown away, but
    for references that nothing of it drew, and so is what a killed publication left; the bundle
    says what it was made with."""
    monkeypatch.setattr(references, "EVALUATED_ROWS", 4)
    folder, tasks = job(tmp_path / "task", shots=1, steps=0, epochs=0), tmp_path / "tasks"
    assert ended(folder).state == "ready"
    images = {path.name: path.read_bytes() for path in (folder / "references").glob("*.png")}
    begun = json.loads((folder / "begun.json").read_text())
    bundle = read_bundle(tasks / "task")
    assert bundle.denoiser.files == begun["bases"]["denoiser"]["files"]
    assert bundle.adaptation["profile"] == begun["profile"] == ADAPTATIONS["nano"].described()

    def again(before: dict[str, Any] | None) -> tuple[bool, bool]:
        """Whether references and what was trained were made anew, begun as said before."""
        shutil.rmtree(tasks / "task")
        (tasks / ".partial-task-x").mkdir()
        Status("queued").write(folder)
        (folder / "references" / "0-0.json").write_text("{}")
        trained = folder / "finetune.safetensors"
        trained.touch()
        (folder / "begun.json").unlink()
        if before is not None:
            write_json(folder / "begun.json", before)
        run(folder, tasks, torch.device("cpu"))
        assert Status.read(folder).state == "ready"
        assert {path.name for path in tasks.iterdir()} == {"task", WRITERS}
        assert json.loads((folder / "begun.json").read_text()) == begun
        return (folder / "references" / "0-0.json").read_text() != "{}", not trained.exists()

    assert again(begun) == (False, False)
    assert again(None) == (True, True)
    unsaid = {name: value for name, value in begun["profile"].items() if name != "text_dtype"}
    assert again({**begun, "profile": unsaid}) == (True, True)
    assert again({name: begun[name] for name in ("bases", "profile")}) == (True, True)
    hashes = {**begun["bases"]["denoiser"]["files"], "unet/config.json": "0"}
    networks = {**begun["bases"], "denoiser": {**begun["bases"]["denoiser"], "files": hashes}}
    assert again({**begun, "bases": networks}) == (True, True)
    networks = {**begun["bases"], "classifier": {**begun["bases"]["classifier"], "files": {}}}
    assert again({**begun, "bases": networks}) == (False, True)
    for part, anew in (
        ({"sampling": {**begun["profile"]["sampling"], "chunk": 8}}, (True, True)),
        ({"finetuning": {**begun["profile"]["finetuning"], "mixing": 0.25}}, (False, True)),
    ):
        assert again({**begun, "profile": {**begun["profile"], **part}}) == anew
    assert again({**begun, "set": {**begun["set"], "k": 1.6}}) == (False, True)
    assert again({**begun, "dtype": "float64"}) == (True, True)
    assert images == {p.name: p.read_bytes() for p in (folder / "references").glob("*.png")}


def test_a_job_draws_and_denoises_in_what_its_cpu_computes_best_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every UNet computes in what the CPU is best at, and the bundle names it; the text encoder in
    float32 on both. The same pictures come of both, but for the rounding."""
    monkeypatch.setattr(references, "EVALUATED_ROWS", 4)
    used: list[torch.dtype] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            used.append(signature(function).bind(*arguments).arguments["dtype"])
            return function(*arguments)

        return call

    monkeypatch.setattr(stages, "Cascade", noted(stages.Cascade))
    monkeypatch.setattr(stages, "personalize", noted(stages.personalize))
    monkeypatch.setitem(DENOISERS, "super-resolution", noted(DENOISERS["super-resolution"]))
    pixels, told = {}, set()
    for kind, able in ((torch.bfloat16, True), (torch.float32, False)):
        monkeypatch.setattr("models.smoothing.computes_bfloat16", lambda able=able: able)
        folder = job(tmp_path / str(able) / "task", steps=2, epochs=1)
        run(folder, folder.parent / "tasks", torch.device("cpu"))
        assert Status.read(folder).state == "ready", Status.read(folder).problem
        assert used == [kind] * 5
        used.clear()
        bundle = read_bundle(folder.parent / "tasks" / "task")
        assert f"torch.{bundle.adaptation['dtype']}" == str(kind)
        told.add(bundle.files[PROMPT_STATES])
        pixels[kind] = read_references(Plan.read(folder), folder / "references", 32).images.int()
    assert len(told) == 1
    apart = (pixels[torch.bfloat16] - pixels[torch.float32]).abs().float().mean()
    assert 0 < apart < LEVELS_APART


def test_prompts_stand_for_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label's prompt is drawn and recognised, to the bit as if it were the label; the bundle and
    the references name the label."""
    monkeypatch.setattr(references, "EVALUATED_ROWS", 4)
    made = []
    for place, labels in (("plain", ["cat", "ship"]), ("named", [("\u732b", "cat"), "ship"])):
        folder = tmp_path / place / "task"
        folder.mkdir(parents=True)
        plan = Plan.checked(labels, shots=1, steps=0, epochs=1)
        write_json(folder / PLAN, {"plan": plan.document, "name": "boats"})
        run(folder, folder.parent / "tasks", torch.device("cpu"))
        made.append(read_bundle(folder.parent / "tasks" / "task"))
    plain, named = made
    assert (named.labels, named.words) == (("\u732b", "ship"), plain.labels)
    assert named.files == plain.files
    assert named.figures == plain.figures
    assert named.figures["measured_on"] == MEASURED_ON
    assert named.digest != plain.digest
    drawn = json.loads((tmp_path / "named" / "task" / "references" / "0-0.json").read_text())
    assert (drawn["label"], drawn["prompt"]) == ("\u732b", "This is a photo of a cat.")
    rows = [Rows(np.zeros((3, 32, 32), np.uint8), bytes(32), 0, 32, 0.5)]
    assert np.array_equal(load(named).votes(rows), load(plain).votes(rows))


def test_a_job_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    """A network that is not there ends the job in `failed`; nothing is published."""
    folder = job(tmp_path / "task")
    described = json.loads((folder / PLAN).read_text())
    described["plan"]["denoiser"] = "gone"
    write_json(folder / PLAN, described)
    run(folder, tmp_path / "tasks", torch.device("cpu"))
    status = Status.read(folder)
    assert status.state == "failed"
    assert status.problem is not None
    assert status.problem["kind"] == "incompatible"
    assert "gone" in status.problem["detail"]
    assert not (tmp_path / "tasks").exists()


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk-full", "make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk-full", "make room"),
        (SafetensorError("IoError(No space left on device)"), "disk-full", "make room"),
        (MemoryError(), "out-of-memory", "other work"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out-of-memory", "other work"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out-of-memory", "other"),
        (Diverged("personalize: the loss of step 3 is nan"), "diverged", "another seed"),
        (BundleError("x: is missing"), "incompatible", "x: is missing"),
        (RuntimeError("surprise"), "internal", "log"),
    ],
)
def test_what_fails_is_told_by_kind_with_what_to_change(
    error: Exception, kind: str, advice: str
) -> None:
    """Each kind of failure has its name and its advice."""
    problem = problem_of(error)
    assert problem["kind"] == kind
    assert advice in problem["detail"]


def test_progress_only_grows_and_counts_what_is_left_out(tmp_path: Path) -> None:
    """Each stage moves the whole on by its share, to 1 with the last; a stage that is left out has
    none; the loss of each stage stays to be read."""
    folder = job(tmp_path / "task", epochs=0)
    progress, seen = Progress(folder, Plan.read(folder)), []
    for stage in ("synthesizing", "personalizing", "evaluating"):
        progress.stage(stage)
        seen.append(Status.read(folder).progress)
        progress.moved(1, 2, 0.5 if stage == "personalizing" else None)
        seen.append(progress.status.progress)
        progress.moved(2, 2)
        seen.append(progress.status.progress)
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[-1] == pytest.approx(1.0, abs=1e-3)
    assert progress.status.losses == {"personalizing": 0.5}
    progress.end("failed", problem={"kind": "internal", "detail": "why"})
    status = Status.read(folder)
    assert (status.state, status.stage) == ("failed", None)
    assert status.finished is not None


def test_what_was_found_done_is_not_taken_for_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that is left goes by what this run has done, not by what an earlier one left it."""
    clock = FakeClock()
    told = SimpleNamespace(monotonic=clock, time=time.time)
    monkeypatch.setattr("models.adaptation.progress.time", told)
    folder = job(tmp_path / "task", shots=64, steps=100, epochs=20)
    progress = Progress(folder, Plan.read(folder))
    progress.stage("synthesizing")
    clock.advance(10)
    progress.moved(256, 256)
    progress.stage("personalizing")  # All its steps were made.
    progress.stage("finetuning")
    assert progress.status.eta_seconds is None
    progress.moved(80, 160)
    assert progress.status.eta_seconds is None
    for step in range(81, 121):
        clock.advance(2)
        progress.moved(step, 160)
    left = 40 * (1 + 4 * 21.4 / 146.6)
    assert progress.status.eta_seconds == pytest.approx(2 * left, rel=0.01)


def test_progress_counts_a_stage_by_the_work_that_is_planned(tmp_path: Path) -> None:
    """Where its stages take as long as nano's did on a CPU, a job is half done in half its time."""
    for shots, epochs in ((64, 20), (4, 20), (64, 200)):
        folder = job(tmp_path / f"{shots}-{epochs}", shots=shots, steps=100, epochs=epochs)
        progress = Progress(folder, replace(Plan.read(folder), labels=tuple("abcdefghij")))
        progress.stage("finetuning")
        before = 135.1 * shots / 64 + 65.4
        after = (146.6 * epochs / 20 + 21.4) * shots / 64
        assert progress.status.progress == pytest.approx(before / (before + after), abs=0.01)
