"""The big models' set, from words to votes, on miniatures in their repositories' very layout."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer
from typer.testing import CliRunner

from models import memory
from models.adaptation import references, stages
from models.adaptation.limits import PlanError
from models.adaptation.plan import PLAN, Plan, Status, write_json
from models.adaptation.profiles import ADAPTATIONS
from models.adaptation.synthesize import Cascade, Drawn, Sampling, encode
from models.bundle import Base, BundleError, read_bundle
from models.classifiers.open_clip import open_clip_tokens, read_open_clip
from models.denoisers.super_resolution import (
    SuperResolutionDenoiser,
    load_super_resolution,
    read_unet,
)
from models.files import KnownHashes
from models.memory import TooLittleMemory, check_room, free_on_host, needs
from models.rows import Rows
from models.runtime import Torch
from models.smoothing import load
from models.zoo.registry import DENOISER_SETS
from service.cli.main import app
from service.config import Settings
from service.secrets import load_secret
from service.tasks.store import Store
from service.worker.model import ModelUnavailable
from tests.support import deepfloyd, miniatures
from tests.support.paths import ROOT
from tests.support.quick_adaptation import EVALUATED_ROWS, quick
from tests.support.serving import problem, serving
from tests.support.shelf import Shelf, bundles

CPU = torch.device("cpu")
QUICK = (sys.executable, "-m", "tests.support.quick_adaptation")
LABELS = ["cat", "ship"]
runner = CliRunner()


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepfloyd.save_models(tmp_path_factory.mktemp("models"), "fp16")


@pytest.fixture
def copied(models_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models_dir, tmp_path / "models")


def test_the_settings_are_the_papers() -> None:
    """Both resolutions are one set, adapted as method.md 5 has it."""
    large, small = DENOISER_SETS["if-ii-l"], DENOISER_SETS["if-ii-l-96"]
    assert (large.resolution, small.resolution) == (224, 96)
    assert (large.k, large.shots, large.steps, large.epochs) == (1.8, 1, 500, 10)
    assert large.template == "This is a photo of a {}."
    ways = ADAPTATIONS["if-ii-l"]
    assert (ways.sampling.guidance, ways.sampling.upscale_guidance) == (7.0, 4.0)
    own = ways.personalization
    assert (own.weight, own.rank, own.timesteps, own.guided_below) == (0.01, 4, (0, 1000), 1000)
    assert (own.profile.learning_rate, own.profile.batch, own.profile.weight_decay) == (1e-4, 24, 0)
    tuning = ways.finetuning
    assert (tuning.profile.learning_rate, tuning.profile.weight_decay) == (5e-7, 0)
    assert (tuning.largest_batch, tuning.soft_targets, tuning.mixing) == (256, False, 1.0)
    assert (ways.dtype, ways.text_dtype) == (torch.bfloat16, torch.bfloat16)
    assert "non-commercial research only" in large.licence


@pytest.mark.parametrize("side", [96, 224])
def test_one_step_equals_diffusers_with_a_learned_variance(side: int, models_dir: Path) -> None:
    """In float64, to 1e-6, what `DDPMScheduler.step` makes of all six channels, at each sigma of
    the paper's table that is used to certify."""
    unet = read_unet(models_dir / "if-ii-l" / "stage2", torch.float32, CPU).double()
    scheduler, states = deepfloyd.scheduler(1.0), miniatures.states().double()
    denoise = SuperResolutionDenoiser(unet, scheduler.alphas_cumprod, states, 1.8)
    generator = torch.Generator().manual_seed(0)
    times = {0.25: 289, 0.5: 496, 1.0: 702} if side == 96 else {0.5: 496}
    sigma = torch.tensor(list(times), dtype=torch.float64)
    x_hat = torch.randn(len(times), 3, side, side, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        ours = denoise(x_hat, sigma)
        for row, t in enumerate(times.values()):
            x_t = (2 * x_hat[row : row + 1] - 1) * scheduler.alphas_cumprod[t].double() ** 0.5
            told = unet(
                torch.cat([x_t, x_t], 1),
                t,
                states[None],
                class_labels=torch.tensor([min(1.8 * t, 1000.0)], dtype=torch.float64),
            ).sample
            assert told.shape[1] == 6
            theirs = scheduler.step(told, t, x_t).pred_original_sample
            assert torch.allclose(2 * ours[row] - 1, theirs[0], rtol=0, atol=1e-6)


def test_half_precision_files_are_read_where_there_are_some(tmp_path: Path) -> None:
    """The variant's file is the one that is read, into the dtype that is asked for, and beats one
    without a variant."""
    deepfloyd.save_stage2(tmp_path, "fp16")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not to be read")
    unet = read_unet(tmp_path, torch.bfloat16, CPU)
    assert unet.dtype == torch.bfloat16
    stored = deepfloyd.unet(2).half().to(torch.bfloat16).state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in unet.state_dict().items())


def test_memory_holds_one_stage_at_a_time(models_dir: Path, tmp_path: Path) -> None:
    """Stage II lets stage I go; what is kept between them continues to the same bits."""
    stages_of = DENOISER_SETS["if-ii-l"].below(models_dir).folders
    states = encode(stages_of[0], ["a cat", "a dog", ""], CPU, torch.bfloat16)
    cascade, few = Cascade(*stages_of, CPU, torch.bfloat16), Sampling(steps=2, upscale_steps=2)
    drawn = cascade.draw(states[:2], states[2], [1, 2], few)
    assert drawn.images.shape == (2, 3, deepfloyd.SMALL, deepfloyd.SMALL)
    assert drawn.images.dtype == torch.float32
    drawn.write(tmp_path / "drawn.safetensors")
    first = cascade.enlarge(drawn, states[:2], states[2], few)
    assert first.shape == (2, deepfloyd.LARGE, deepfloyd.LARGE, 3)
    held = [each for each in vars(cascade).values() if isinstance(each, tuple) and len(each) == 2]
    assert [each[1].unet.config.sample_size for each in held if each != stages_of] == [128]
    kept = Drawn.read(tmp_path / "drawn.safetensors")
    again = Cascade(*stages_of, CPU, torch.bfloat16).enlarge(kept, states[:2], states[2], few)
    assert np.array_equal(first, again)


def test_the_clip_is_openais(models_dir: Path) -> None:
    """Its configuration says quick GELU, and its tokenizer is CLIP's own, 77 tokens long."""
    clip, tokenizer = read_open_clip(models_dir / "clip-vit-b-32", CPU)
    assert any(isinstance(module, QuickGELU) for module in clip.visual.modules())
    words = ["a photo of a cat.", "an axolotl"]
    counted = open_clip_tokens(models_dir / "clip-vit-b-32", words)
    assert tokenizer(words).shape == (2, 77)
    assert counted == (tokenizer(words) != 0).sum(1).tolist()


def test_tokens_are_counted_without_torch_as_the_tokenizer_counts_them(models_dir: Path) -> None:
    """The count that a request is refused by is that of the T5 tokenizer the job uses."""
    cascade = DENOISER_SETS["if-ii-l"].below(models_dir)
    tokenizer = AutoTokenizer.from_pretrained(cascade.folders[0] / "tokenizer")
    for prompt in ("this is a photo of a cat.", "  two  spaces ", "", "\u732b ship", "x" * 40):
        assert cascade.tokens(cascade.folders[0], prompt) == len(tokenizer(prompt).input_ids)
    pieces = SentencePieceProcessor(
        model_file=str(cascade.folders[0] / "tokenizer" / "spiece.model")
    )
    assert pieces.get_piece_size() <= deepfloyd.PIECES


def test_long_prompts_are_refused_by_name(models_dir: Path, tmp_path: Path) -> None:
    """The text encoder's limit is known when a plan is made; CLIP's is checked by the job before
    anything is loaded."""
    with pytest.raises(PlanError, match="the text encoder reads at most 77") as refused:
        Plan.checked(["cat", "q1" * 40], denoiser="if-ii-l", models_dir=models_dir)
    assert (refused.value.field, refused.value.limit) == ("labels.1", 77)

    words = ["cat", "\u0436\u0449" * 50]
    plan = Plan.checked(words, denoiser="if-ii-l-96", steps=0, epochs=0, models_dir=models_dir)
    status = ended(plan, tmp_path, models_dir)
    assert status.state == "failed"
    assert status.problem is not None
    assert status.problem["kind"] == "incompatible"
    assert "has 209 tokens; the classifier reads at most 77" in status.problem["detail"]
    assert not (tmp_path / "job" / "references").exists()


def ended(plan: Plan, folder: Path, models_dir: Path) -> Status:
    """The status of the plan's job, run in this process to its end."""
    (folder / "job").mkdir()
    told = {"plan": asdict(plan), "name": "two", "owner": None, "created": 0.0}
    write_json(folder / "job" / PLAN, told)
    stages.run(folder / "job", folder / "tasks", CPU, models_dir)
    return Status.read(folder / "job")


def test_a_task_at_224_pixels_is_made_and_asked(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Words become references, adapter, tuned classifier and a bundle that names networks, revision
    and licence; it votes, without the text encoder or stage I; and what lies
    beside stage II is never loaded."""
    monkeypatch.setitem(ADAPTATIONS, "if-ii-l", quick(ADAPTATIONS["if-ii-l"]))
    monkeypatch.setattr(references, "EVALUATED_ROWS", EVALUATED_ROWS)
    told = {"repository": "DeepFloyd/IF-II-L-v1.0", "commit": "c" * 40, "files": {}}
    (copied / "if-ii-l" / "stage2" / "source.json").write_text(json.dumps(told))
    plan = Plan.checked(LABELS, denoiser="if-ii-l", steps=2, epochs=1, models_dir=copied)
    assert ended(plan, tmp_path, copied).state == "ready"
    assert not list((tmp_path / "job").glob("*checkpoint*"))
    assert "non-commercial research only" in capfd.readouterr().out
    with Image.open(tmp_path / "job" / "references" / "0-0.png") as picture:
        assert picture.size == (deepfloyd.LARGE, deepfloyd.LARGE)
    bundle = read_bundle(tmp_path / "tasks" / "job")
    assert (bundle.resolution, bundle.k, bundle.prompt) == (224, 1.8, "this is a photo of a sks.")
    assert bundle.adaptation["networks"] == {"denoiser": f"DeepFloyd/IF-II-L-v1.0@{'c' * 40}"}
    assert bundle.denoiser.folder == str(copied / "if-ii-l" / "stage2")
    assert set(bundle.classifier.files) == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert "non-commercial research only" in bundle.licence
    assert "MIT" in bundle.licence

    shutil.rmtree(copied / "if-ii-l" / "stage1")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224), np.uint8)
    rows = [Rows(pixels, bytes(32), 0, 3, 0.25)]
    votes = [
        load(bundle, batch_rows=2, cpu_threads=1, models_dir=copied).votes(rows) for _ in range(2)
    ]
    assert votes[0].sum() == 3
    assert np.array_equal(*votes)
    unlisted = copied / "if-ii-l" / "stage2" / "unet" / "other.safetensors"
    unlisted.write_bytes(b"other weights")
    with pytest.raises(BundleError, match=r"unet/other.safetensors: is not of the base network"):
        bundle.denoiser.verified(copied)
    again = load(bundle, batch_rows=2, cpu_threads=1, models_dir=copied).votes(rows)
    assert np.array_equal(again, votes[0])


def test_a_task_at_96_pixels_from_the_command_line(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`adapt` runs the job in its own process, below the configured models directory, and `predict`
    answers for the task."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("VOUCHSAFE_MODELS_DIR", str(models_dir))
    monkeypatch.setattr("service.tasks.process.JOB", QUICK)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    sheet = str(tmp_path / "sheet.png")
    asked = ["--denoiser", "if-ii-l-96", "--steps", "1", "--epochs", "1", "--out", sheet]
    adapted = runner.invoke(app, ["adapt", "--labels", str(tmp_path / "labels.txt"), *asked])
    store = Store(Settings(), load_secret(tmp_path / "data"))
    (task,) = store.all()
    log = (store.jobs / task.id / "log.txt").read_text()
    assert adapted.exit_code == 0, f"{adapted.output}{log}"
    assert read_bundle(store.tasks / task.id).resolution == 96
    ship = str(ROOT / "docs" / "ship.png")
    question = ["predict", ship, "--mode", "predict", "--n", "16", "--json", "--task", task.id]
    answered = runner.invoke(app, question)
    assert answered.exit_code == 0, answered.output
    told = json.loads(answered.stdout)
    assert (told["resolution"], sum(vote["count"] for vote in told["counts"])) == (96, 16)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def linked(path: Path) -> Path:
    """Where the file lies that was there, with a link to it in its place."""
    blob = path.parents[3] / "blob"
    path.rename(blob)
    path.symlink_to(blob)
    return blob


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (
        lambda d: shutil.rmtree(d / "if-ii-l" / "stage1"),
        r'denoiser set "if-ii-l" cannot be used: .*/if-ii-l/stage1 is not there; '
        r"`vouchsafe models fetch if-ii-l` fetches it",
    ),
    "a shard is missing": (
        lambda d: next((d / "if-ii-l/stage1/text_encoder").glob("*-00002-of-*")).unlink(),
        r"model.fp16-00002-of-00003.safetensors is missing.* goes on where it stopped",
    ),
    "an index is missing": (
        lambda d: next((d / "if-ii-l/stage1/text_encoder").glob("*.index.*")).unlink(),
        r"the index of model.fp16-00001-of-00003.safetensors is missing",
    ),
    "cut short": (
        lambda d: cut_short(d / "if-ii-l/stage2/unet/diffusion_pytorch_model.fp16.safetensors"),
        r"stage2/unet/diffusion_pytorch_model.fp16.safetensors: has \d+ bytes; its header states",
    ),
    "no header": (
        lambda d: (d / "if-ii-l/stage2/unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(
            b"<html>"
        ),
        r"is not a complete safetensors file",
    ),
    "left over": (
        lambda d: (d / "if-ii-l/stage2/unet/x.incomplete").write_bytes(b""),
        r"stage2: a download was cut short: x.incomplete",
    ),
    "pickled": (
        lambda d: (d / "if-ii-l/stage2/unet/diffusion_pytorch_model.bin").write_bytes(b""),
        r"stage2: holds pickled files; remove diffusion_pytorch_model.bin",
    ),
    "a link, as in the hub's cache": (
        lambda d: linked(d / "if-ii-l/stage2/unet/config.json"),
        r"stage2: holds links, which are never followed: unet/config.json; copy their targets",
    ),
    "a link that leads nowhere": (
        lambda d: linked(d / "if-ii-l/stage1/unet/config.json").unlink(),
        r"stage1: holds links, which are never followed: unet/config.json",
    ),
    "no tokenizer": (
        lambda d: (d / "if-ii-l/stage1/tokenizer/spiece.model").unlink(),
        r"tokenizer/spiece.model is missing",
    ),
    "a broken tokenizer": (
        lambda d: (d / "if-ii-l/stage1/tokenizer/spiece.model").write_bytes(b"broken"),
        r"stage1/tokenizer: the tokenizer cannot be read",
    ),
    "a classifier without weights": (
        lambda d: (d / "clip-vit-b-32/open_clip_model.safetensors").unlink(),
        r'classifier set "clip-vit-b-32" cannot be used: .*holds no open_clip_model.safetensors',
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_networks_that_are_not_whole_are_refused_when_a_task_is_asked_for(
    damage: str, copied: Path
) -> None:
    """The plan names the field and the set, says what is wrong where, and what to do."""
    spoil, reason = DAMAGE[damage]
    spoil(copied)
    with pytest.raises(PlanError, match=reason) as refused:
        Plan.checked(LABELS, denoiser="if-ii-l", models_dir=copied)
    field = "classifier" if "classifier" in damage else "denoiser"
    assert refused.value.field == field


def test_networks_that_cannot_be_read_are_refused_by_name(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the service may not open is told with its name, as any other trouble."""

    def closed(path: Path) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("models.zoo.inventory.parameters_of", closed)
    reason = r"cannot be used: .*/stage1/text_encoder/model.fp16-\S+: Permission denied"
    with pytest.raises(PlanError, match=reason):
        Plan.checked(LABELS, denoiser="if-ii-l", models_dir=models_dir)


async def test_a_request_for_networks_that_are_absent_is_refused(tmp_path: Path) -> None:
    """`POST /tasks` answers 422 with the field, the set and the command that fetches it."""
    async with serving(data_dir=tmp_path) as service:
        asked = {"labels": LABELS, "denoiser": "if-ii-l"}
        refused = problem(await service.client.post("/tasks", json=asked), 422, "invalid-field")
        (error,) = refused["errors"]
        assert (error["field"], error["value"]) == ("denoiser", "if-ii-l")
        assert "vouchsafe models fetch if-ii-l" in refused["detail"]
        assert str(tmp_path / "models" / "if-ii-l" / "stage1") in refused["detail"]
        listed = (await service.client.get("/tasks")).json()
        assert listed["tasks"] == []


def test_too_little_memory_is_told_before_loading(models_dir: Path) -> None:
    """What would not fit is refused with what it takes and what is free."""
    with pytest.raises(TooLittleMemory, match=r"a network takes 1048576\.0 GiB and .* are free on"):
        check_room("a network", 2**50, CPU)
    check_room("nothing", 0, CPU)


def test_a_load_that_cannot_fit_is_not_begun(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text encoder and UNet each look for room first, by the parameters their headers count."""
    monkeypatch.setattr("models.memory.free_on_host", lambda: 1_000)
    stage1 = models_dir / "if-ii-l" / "stage1"
    with pytest.raises(TooLittleMemory, match="the text encoder takes"):
        encode(stage1, ["a cat"], CPU, torch.bfloat16)
    with pytest.raises(TooLittleMemory, match="stage1's UNet takes"):
        read_unet(stage1, torch.bfloat16, CPU)


def test_a_personalized_task_looks_for_room_on_its_device_too(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights go through the host in float32, and the device is asked before that."""

    def full(what: str, needed: int, device: torch.device) -> None:
        raise TooLittleMemory(f"{what} takes {needed} on {device}")

    monkeypatch.setattr("models.denoisers.super_resolution.check_room", full)
    stage2, states = models_dir / "if-ii-l" / "stage2", miniatures.states()
    needed = 2 * sum(parameter.numel() for parameter in deepfloyd.unet(2).parameters())
    with pytest.raises(TooLittleMemory, match=rf"stage2's UNet takes {needed} on cuda"):
        load_super_resolution(
            stage2, states, 1.8, torch.device("cuda"), torch.bfloat16, Torch(), Path("adapter")
        )


def test_pages_of_files_are_free_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read, once or twice, can go at once: only the rest counts against the limit."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_available", lambda: None)
    assert free_on_host() is None
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 300\nactive_file 400\n")
    for limit, free in (("1000\n", 800), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit)
        assert free_on_host() == free


def test_callers_are_told_what_does_not_fit() -> None:
    """A task whose networks have no room, even alone, is refused with the sizes."""
    shelf = Shelf(bundles("default", "a"))
    shelf.failures = [TooLittleMemory("stage2's UNet takes 2.2 GiB and 1.0 GiB are free")] * 2
    with pytest.raises(ModelUnavailable, match="stage2's UNet takes"):
        shelf.use("a")


def test_memory_is_computed_from_the_numbers_of_parameters() -> None:
    """Serving holds stage II and the classifier; adapting, the largest of what it holds in turn."""
    told = needs(text_encoder=100, stage1=90, stage2=20, classifier=2)
    assert told["to serve in bfloat16"] == 2 * 22
    assert told["to serve in float32"] == 4 * 22
    assert told["to adapt in bfloat16"] == 200
    assert needs(0, 0, 20, 2)["to adapt in bfloat16"] == 4 * 20 + 8 * 2


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    """A restarted job reads stage I's files again only where they have changed."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"one")
    known = KnownHashes(tmp_path / "hashes.json")
    first = known(file)
    stored = json.loads((tmp_path / "hashes.json").read_text())
    stored[str(file)][-1] = "remembered"
    (tmp_path / "hashes.json").write_text(json.dumps(stored))
    assert KnownHashes(tmp_path / "hashes.json")(file) == "remembered"
    file.write_bytes(b"other")
    assert KnownHashes(tmp_path / "hashes.json")(file) not in (first, "remembered")
    listed = Base.of("timm", str(tmp_path), ["*.safetensors"], KnownHashes(tmp_path / "h.json"))
    assert listed == Base.of("timm", str(tmp_path), ["*.safetensors"])
