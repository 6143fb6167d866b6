"""Tasks adapted from registered networks: their labels, their limits, and one whole job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.adaptation import profiles, references, stages
from models.adaptation.limits import PlanError
from models.adaptation.plan import PLAN, Plan, Status
from models.bundle import ADAPTER, TUNED, read_bundle
from models.smoothing import load
from models.zoo.adding import Wanted, adding
from tests.support import miniatures, own_networks
from tests.support.quick_adaptation import EVALUATED_ROWS, quick

CPU = torch.device("cpu")
LABELS = own_networks.NAMES


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory with networks registered under five names."""
    root = tmp_path_factory.mktemp("own")
    own_networks.save_vit(root / "vit")
    own_networks.save_clip(root / "clip")
    own_networks.save_onnx(root / "onnx")
    own_networks.save_ffdnet(root / "ffdnet")
    miniatures.save_cascade(root / "cascade")
    cascade = f"super-resolution:{root / 'cascade'}"
    for wanted in (
        Wanted("vit", f"transformers:{root / 'vit'}"),
        Wanted("clip", f"transformers:{root / 'clip'}", labels=LABELS),
        Wanted("onnx", f"onnx:{root / 'onnx'}", denoiser=f"ffdnet:{root / 'ffdnet'}"),
        Wanted("both", f"transformers:{root / 'clip'}", LABELS, None, cascade, 32),
    ):
        with adding(wanted, root / "tasks", root / "models", CPU) as addition:
            addition.publish(root / "tasks")
    return root / "models"


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles of few steps."""
    short = {name: quick(ways) for name, ways in profiles.ADAPTATIONS.items()}
    monkeypatch.setattr(profiles, "ADAPTATIONS", short)
    monkeypatch.setattr(profiles, "_IF_II_L", quick(profiles._IF_II_L))
    monkeypatch.setattr(references, "EVALUATED_ROWS", EVALUATED_ROWS)


@pytest.mark.parametrize(
    ("denoiser", "classifier"), [("nano", "vit"), ("nano", "clip"), ("both", None)]
)
def test_registered_networks_are_adapted_by_words(
    denoiser: str, classifier: str | None, models_dir: Path, tmp_path: Path, quickly: None
) -> None:
    """A job on registered networks ends in a bundle whose adapted parts load."""
    plan = Plan.checked(
        LABELS,
        denoiser=denoiser,
        classifier=classifier,
        shots=1,
        steps=1,
        epochs=1,
        models_dir=models_dir,
    )
    job = tmp_path / "job"
    job.mkdir()
    (job / PLAN).write_text(json.dumps({"plan": plan.document, "name": "own", "owner": None}))
    stages.run(job, tmp_path / "tasks", CPU, models_dir)
    status = Status.read(job)
    assert status.state == "ready", status.problem
    bundle = read_bundle(tmp_path / "tasks" / "job")
    assert {ADAPTER, TUNED} <= bundle.files.keys()
    assert bundle.classifier.folder == str(
        models_dir / "own" / (classifier or "both") / "classifier"
    )
    assert load(bundle, models_dir=models_dir).classifier.labels == LABELS


@pytest.mark.parametrize(
    ("settings", "field", "reason"),
    [
        ({"classifier": "onnx"}, "classifier", "a network of kind onnx gives no gradients"),
        ({"denoiser": "onnx"}, "denoiser", "onnx has ffdnet; a task is adapted from a cascade"),
        ({"denoiser": "vit"}, "denoiser", "vit has no denoiser; a task is adapted from a cascade"),
        ({"classifier": "absent"}, "classifier", 'There is no classifier set "absent"'),
        ({"classifier": "../own/vit"}, "classifier", "There is no classifier set"),
        ({"classifier": "own/vit"}, "classifier", "There is no classifier set"),
    ],
)
def test_networks_that_cannot_be_adapted_are_refused(
    settings: dict[str, str], field: str, reason: str, models_dir: Path
) -> None:
    """A name without what an adaptation needs is refused with the reason; a path is no name."""
    with pytest.raises(PlanError, match=reason) as refused:
        Plan.checked(LABELS, models_dir=models_dir, **settings)
    assert refused.value.field == field


def test_a_classifier_of_fixed_labels_takes_no_others(models_dir: Path) -> None:
    """Other labels than the network's own are refused, and those are named; a CLIP takes any."""
    with pytest.raises(PlanError, match=r"has fixed labels.*: cat, dog, ship"):
        Plan.checked(("cat", "frog"), classifier="vit", models_dir=models_dir)
    assert Plan.checked(("cat", "frog"), classifier="clip", models_dir=models_dir).shots == 64


def test_a_prompt_that_a_registered_head_would_cut_ends_the_job(
    models_dir: Path, tmp_path: Path, quickly: None
) -> None:
    """The job counts tokens with the head's own tokenizer before it loads a network."""
    long = "cat " * 12
    plan = Plan.checked(
        ["dog", ("cat", long)],
        classifier="clip",
        shots=1,
        allow_unknown_labels=True,
        models_dir=models_dir,
    )
    (tmp_path / PLAN).write_text(json.dumps({"plan": plan.document, "name": "", "owner": None}))
    stages.run(tmp_path, tmp_path / "tasks", CPU, models_dir)
    problem = Status.read(tmp_path).problem or {}
    assert "the classifier reads at most 40" in problem["detail"]
