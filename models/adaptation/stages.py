"""Stages of one adaptation job, from a plan to a published bundle."""

from __future__ import annotations

import json
import shutil
import time
import traceback
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.adaptation.finetune import finetune
from models.adaptation.limits import PlanError, usable
from models.adaptation.personalize import personalize
from models.adaptation.plan import (
    REFERENCES,
    Plan,
    Status,
    locked,
    name_of,
    write_json,
)
from models.adaptation.profiles import Adaptation, adaptation_of
from models.adaptation.progress import Progress, problem_of
from models.adaptation.prompts import check_head
from models.adaptation.references import References, figures_of, read_references
from models.adaptation.synthesize import Cascade, encode, synthesize
from models.adaptation.tunables import TUNABLES
from models.bundle import (
    ADAPTER,
    MODELS,
    PROMPT_STATES,
    TUNED,
    Base,
    Bundle,
    read_bundle,
    write_bundle,
)
from models.classifiers.base import Classifier
from models.classifiers.registry import classifier_loader
from models.denoisers.base import Denoiser
from models.denoisers.prompts import clean_prompts
from models.denoisers.registry import DENOISERS
from models.files import KnownHashes, written_whole
from models.nano.captions import BLANK
from models.runtime import Torch, name_of_dtype
from models.zoo.registry import CLASSIFIER_SETS, DENOISER_SETS, ClassifierSet, DenoiserSet
from models.zoo.sources import origin

BEGUN = "begun.json"
"""A job's file of its first run's inputs.

It holds the networks' hashes, the set and its profile, and the dtype of the frozen UNets.
"""
HASHES = "hashes.json"
"""A job's cache of hashes, because stage I's take long."""
_STAGE1_FILES = ["text_encoder/*", "tokenizer/*", "unet/*", "scheduler/*"]
_STAGE2_FILES = ["unet/*", "scheduler/*"]


def _draws(begun: dict[str, Any]) -> Any:
    """The part of a job's inputs that its references follow from; None for a missing field."""
    bases, profile = begun.get("bases", {}), begun.get("profile", {})
    draws = [bases.get(name) for name in ("stage1", "denoiser")]
    return [*draws, begun.get("dtype"), *(profile.get(name) for name in ("sampling", "text_dtype"))]


class Job:
    """A plan's stages, each of which resumes from an earlier run's files."""

    def __init__(
        self, folder: Path, tasks: Path, device: torch.device, models_dir: Path | None
    ) -> None:
        self._folder, self._tasks, self._device = folder, tasks, device
        self._plan = plan = Plan.read(folder)
        self._set: DenoiserSet = usable("denoiser", DENOISER_SETS, plan.denoiser, models_dir)
        self._head: ClassifierSet = usable(
            "classifier", CLASSIFIER_SETS, plan.classifier, models_dir
        )
        print(f"the networks' licenses: {self._licence()}", flush=True)
        self._ways: Adaptation = adaptation_of(plan.denoiser)
        self._dtype = self._ways.dtype_on(device)
        hashes = KnownHashes(folder / HASHES)
        self._bases = {
            "stage1": Base.of("text-to-image", self._set.stage1, _STAGE1_FILES, hashes),
            "denoiser": Base.of("super-resolution", self._set.stage2, _STAGE2_FILES, hashes),
            "classifier": Base.of(self._head.kind, self._head.folder, self._head.files, hashes),
        }
        self.progress = Progress(folder, plan)

    def run(self) -> None:
        """Run every stage, then publish the bundle."""
        for partial_bundle in self._tasks.glob(f".partial-{self._folder.name}-*"):
            shutil.rmtree(partial_bundle, ignore_errors=True)
        published = self._tasks / self._folder.name
        if published.exists():
            return self._ready(dict(read_bundle(published).figures))
        self._begin()
        self.progress.stage("synthesizing")
        states = self._states()
        references = self._references(states)
        classifier = self._classifier(None)
        adapter = tuned = None
        if self._plan.steps:
            self.progress.stage("personalizing")
            adapter = self._personalized(references, states["personalized"], classifier)
        if self._plan.epochs:
            self.progress.stage("finetuning")
            tuned = self._finetuned(references, self._denoiser(states, adapter))
        self.progress.stage("evaluating")
        zero_shot = self._denoiser(states, None), classifier
        adapted = (
            self._denoiser(states, adapter) if adapter else zero_shot[0],
            self._classifier(tuned) if tuned else classifier,
        )
        figures = figures_of(references, zero_shot, adapted, self._device, self.progress.moved)
        self._publish(states, adapter, tuned, figures)
        return self._ready(figures)

    def _ready(self, figures: dict[str, Any]) -> None:
        """End the job. Removes the checkpoints, which take three times the size of the trained
        weights.
        """
        for left in self._folder.glob("*.checkpoint.safetensors"):
            left.unlink()
        self.progress.end("ready", progress=1.0, figures=figures)

    def _begin(self) -> None:
        """Discard an earlier run of the job that had other networks, settings or dtype, or states
        no dtype.

        References stay where nothing that they follow from has changed.
        """
        bases = {name: asdict(base) for name, base in self._bases.items()}
        of_set = {"k": self._set.k, "identifier": self._set.identifier}
        now = {
            "bases": bases,
            "set": of_set,
            "profile": self._ways.described(),
            "dtype": name_of_dtype(self._dtype),
        }
        begun, references = self._folder / BEGUN, self._folder / REFERENCES
        before = json.loads(begun.read_text()) if begun.exists() else {}
        if before == now:
            return
        if references.exists() and _draws(before) != _draws(now):
            shutil.rmtree(references)
        for pattern in ("*.safetensors", "*.jsonl"):
            for left in self._folder.glob(pattern):
                left.unlink()
        write_json(begun, now)

    def _states(self) -> dict[str, Tensor]:
        """Prompt states, computed once.

        Those of the labels and the empty prompt (K+1,77,D), of the template with a blank and with
        the identifier (77,D).
        """
        check_head(self._plan, self._head)
        blank = self._plan.template.format(BLANK)
        identified = self._plan.template.format(self._set.identifier)
        prompts = [*self._plan.captions(), "", blank, identified]
        try:
            states = encode(self._set.folders[0], prompts, self._device, self._ways.text_dtype)
        except ValueError as error:
            raise PlanError("labels", str(error)) from error
        return {"labels": states[:-2], "blank": states[-2], "personalized": states[-1]}

    def _references(self, states: dict[str, Tensor]) -> References:
        cascade = partial(Cascade, *self._set.folders, self._device, self._dtype)
        folder = self._folder / REFERENCES
        synthesize(
            self._plan, folder, cascade, states["labels"], self._ways.sampling, self.progress.moved
        )
        return read_references(self._plan, folder, self._set.resolution)

    def _classifier(self, tuned: Path | None) -> Classifier:
        return classifier_loader(self._head.kind)(
            MODELS / self._head.folder,
            self._plan.words,
            self._plan.template,
            self._device,
            torch.float32,
            Torch(),
            tuned,
        )

    def _denoiser(self, states: dict[str, Tensor], adapter: Path | None) -> Denoiser:
        return DENOISERS["super-resolution"](
            self._set.folders[1],
            states["personalized" if adapter else "blank"],
            self._set.k,
            self._device,
            self._dtype,
            Torch(),
            adapter,
        )

    def _personalized(self, references: References, states: Tensor, classifier: Classifier) -> Path:
        settings = self._ways.personalization
        return personalize(
            self._set.folders[1],
            references,
            states,
            self._set.k,
            classifier,
            replace(settings, profile=replace(settings.profile, steps=self._plan.steps)),
            self._folder,
            self._device,
            self._dtype,
            self._plan.seed,
            self.progress.moved,
        )

    def _finetuned(self, references: References, denoiser: Denoiser) -> Path:
        tunable = TUNABLES[self._head.kind](
            MODELS / self._head.folder, self._plan.words, self._plan.template, self._device
        )
        return finetune(
            tunable,
            denoiser,
            references,
            self._ways.finetuning,
            self._plan.epochs,
            self._folder,
            self._device,
            self._plan.seed,
            self.progress.moved,
        )

    def _publish(
        self,
        states: dict[str, Tensor],
        adapter: Path | None,
        tuned: Path | None,
        figures: dict[str, Any],
    ) -> None:
        prompt = self._plan.template.format(self._set.identifier if adapter else BLANK)
        prompt_states = self._folder / PROMPT_STATES
        chosen = states["personalized" if adapter else "blank"].clone()
        with written_whole(prompt_states) as partial_file:
            save_file({"states": chosen}, partial_file)
        sources = {PROMPT_STATES: prompt_states}
        sources |= {ADAPTER: adapter} if adapter else {}
        sources |= {TUNED: tuned} if tuned else {}
        task = Bundle(
            id=self._folder.name,
            labels=self._plan.labels,
            template=self._plan.template,
            prompt=clean_prompts([prompt])[0],
            k=self._set.k,
            resolution=self._set.resolution,
            largest_sigma=self._set.largest_sigma,
            denoiser=self._bases["denoiser"],
            classifier=self._bases["classifier"],
            licence=self._licence(),
            files={},
            name=name_of(self._folder),
            adaptation=self._adaptation(),
            figures=figures,
            prompts=self._plan.prompts,
        )
        write_bundle(self._tasks / self._folder.name, task, sources)

    def _licence(self) -> str:
        return "; ".join(dict.fromkeys([self._set.licence, self._head.licence]))

    def _adaptation(self) -> dict[str, Any]:
        """The plan's settings, its set's profile, and the dtype of the frozen UNets.

        Fetched networks add their repository and commit.
        """
        settings = asdict(self._plan)
        for known in ("labels", "template", "prompts"):
            del settings[known]
        settings |= {"profile": self._ways.described(), "dtype": name_of_dtype(self._dtype)}
        found = {name: origin(MODELS / base.folder) for name, base in self._bases.items()}
        if fetched := {name: where for name, where in found.items() if where is not None}:
            settings["networks"] = fetched
        return settings


def run(folder: Path, tasks: Path, device: torch.device, models_dir: Path | None = None) -> None:
    """Run a job to its end; a failure ends it in `failed`, with a problem.

    Raises only where the status cannot be written.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with locked(folder):
        if Status.read(folder).state == "ready":
            return
        try:
            job = Job(folder, tasks, device, models_dir)
        except Exception as error:
            traceback.print_exc()
            Status("failed", problem=problem_of(error), finished=time.time()).write(folder)
            return
        try:
            job.run()
        except Exception as error:
            traceback.print_exc()
            job.progress.end("failed", problem=problem_of(error))
