"""Networks fetched from a hub: what is taken, from where, what is checked, and what is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub.hf_api import RepoSibling
from typer.testing import CliRunner

from models.zoo.hub import UNFINISHED, FetchError, make_room
from models.zoo.inventory import inspect
from models.zoo.sources import FETCHABLE, SOURCES
from service.cli.main import app
from tests.support import deepfloyd
from tests.support.adapting import wait_until
from tests.support.hub_server import Hub, serving
from tests.support.paths import ROOT

MAIN = "from service.cli import main; main.main()"
COMMITS = {SOURCES[name].repository: SOURCES[name].revision for name in FETCHABLE["if-ii-l"]}
STAGE1, STAGE2, CLIP = FETCHABLE["if-ii-l"]
runner = CliRunner()


class Result(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories, with all that is beside the files to fetch: pickles, full precision, other
    quantisations, a safety checker."""
    root = deepfloyd.save_models(tmp_path_factory.mktemp("upstream"), "fp16")
    for name in (
        f"{STAGE1}/unet/diffusion_pytorch_model.safetensors",
        f"{STAGE1}/unet/diffusion_pytorch_model.fp16.bin",
        f"{STAGE1}/text_encoder/model-00001-of-00001.safetensors",
        f"{STAGE1}/text_encoder/model.safetensors.index.json",
        f"{STAGE1}/text_encoder/model.8bit.safetensors",
        f"{STAGE1}/text_encoder/pytorch_model.bin",
        f"{STAGE1}/safety_checker/model.fp16.safetensors",
        f"{STAGE2}/unet/diffusion_pytorch_model.safetensors",
        f"{STAGE2}/text_encoder/model.fp16.safetensors",
        f"{STAGE2}/tokenizer/spiece.model",
        f"{CLIP}/open_clip_pytorch_model.bin",
        f"{CLIP}/README.md",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not to be fetched")
    return root


@pytest.fixture
def hub(upstream: Path) -> Iterator[Hub]:
    folders = {SOURCES[name].repository: upstream / name for name in FETCHABLE["if-ii-l"]}
    with serving(Hub(folders, dict(COMMITS))) as hub:
        yield hub


def started(hub: Hub, models_dir: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """`vouchsafe models fetch if-ii-l`, in a process of its own."""
    told = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(models_dir.parent / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "COLUMNS": "500",
        "VOUCHSAFE_MODELS_DIR": str(models_dir),
        "PYTHONPATH": str(ROOT),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.Popen(  # noqa: S603 - our own command.
        [sys.executable, "-c", MAIN, "models", "fetch", "if-ii-l", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, **told, **environment},
    )


def fetch(hub: Hub, models_dir: Path, *options: str, **environment: str) -> Result:
    """The same, once it has ended."""
    with started(hub, models_dir, *options, **environment) as process:
        stdout, stderr = process.communicate(timeout=120)
    return Result(process.returncode, stdout, stderr)


def test_only_what_is_needed_is_fetched_and_again_nothing(hub: Hub, tmp_path: Path) -> None:
    """Half-precision safetensors and small files alone come, at the pinned commits; the folders say
    from where; fetching again sends no file, and `check` finds all of it whole."""
    done = fetch(hub, tmp_path / "models")
    assert done.returncode == 0, done.stderr
    assert "non-commercial research only" in done.stdout
    there = sorted(
        path.relative_to(tmp_path / "models").as_posix()
        for path in (tmp_path / "models").rglob("*")
        if path.is_file() and ".cache" not in path.parts
    )
    encoder = [f"{STAGE1}/text_encoder/model.fp16-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert there == sorted(
        [
            *encoder,
            f"{STAGE1}/text_encoder/model.safetensors.index.fp16.json",
            f"{STAGE1}/text_encoder/config.json",
            f"{STAGE1}/tokenizer/special_tokens_map.json",
            f"{STAGE1}/tokenizer/spiece.model",
            f"{STAGE1}/tokenizer/tokenizer_config.json",
            f"{CLIP}/open_clip_config.json",
            f"{CLIP}/open_clip_model.safetensors",
            f"{STAGE2}/image_noising_scheduler/scheduler_config.json",
            *(f"{name}/source.json" for name in (STAGE1, STAGE2, CLIP)),
            *(f"{name}/model_index.json" for name in (STAGE1, STAGE2)),
            *(f"{name}/scheduler/scheduler_config.json" for name in (STAGE1, STAGE2)),
            *(f"{name}/unet/config.json" for name in (STAGE1, STAGE2)),
            *(f"{name}/unet/diffusion_pytorch_model.fp16.safetensors" for name in (STAGE1, STAGE2)),
        ]
    )
    found = inspect(STAGE2, tmp_path / "models")
    assert found.origin == f"DeepFloyd/IF-II-L-v1.0@{SOURCES[STAGE2].revision}"
    hub.sent.clear()
    again = fetch(hub, tmp_path / "models")
    assert (again.returncode, hub.sent) == (0, []), again.stderr

    whole = runner.invoke(app, ["models", "check", str(tmp_path / "models"), "--hashes"])
    assert whole.exit_code == 0, whole.output
    assert f"{STAGE1}: DeepFloyd/IF-I-XL-v1.0@" in whole.stdout
    assert "to adapt in bfloat16: 0.0" in whole.stdout
    config = tmp_path / "models" / CLIP / "open_clip_config.json"
    config.write_text(config.read_text() + " ")
    changed = runner.invoke(app, ["models", "check", str(tmp_path / "models"), "--hashes"])
    assert changed.exit_code == 1
    assert "open_clip_config.json: is not what was fetched" in changed.stderr.replace("\n", "")


def test_a_licence_that_is_not_accepted_is_told_with_the_page(hub: Hub, tmp_path: Path) -> None:
    """The message has the page to accept it at and the two ways to give a token; with one, the same
    command goes on."""
    hub.gated = set(COMMITS)
    refused = fetch(hub, tmp_path / "models")
    assert refused.returncode == 1
    said = " ".join(refused.stderr.split())
    assert f"Sign in at {hub.address}/DeepFloyd/IF-I-XL-v1.0 and accept it there" in said
    assert "HF_TOKEN" in said
    assert "hf auth login" in said
    assert inspect(STAGE1, tmp_path / "models").origin is None
    accepted = fetch(hub, tmp_path / "models", HF_TOKEN=hub.token)
    assert accepted.returncode == 0, accepted.stderr


def test_a_download_that_was_cut_short_goes_on(hub: Hub, tmp_path: Path) -> None:
    """Files that are whole stay; one that was cut short, or damaged since, is fetched anew."""
    models_dir = tmp_path / "models"
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    body = (hub.folders["DeepFloyd/IF-I-XL-v1.0"] / name).read_bytes()
    hub.stops = f"DeepFloyd/IF-I-XL-v1.0/{name}"
    shards = f"{STAGE1}/text_encoder/model.fp16-*.safetensors"
    with started(hub, models_dir) as process:
        wait_until(lambda: not hub.stops and len(list(models_dir.glob(shards))) == 3)
        process.kill()
    hub.go_on.set()
    files = (path for path in (models_dir / STAGE1).rglob("*") if path.is_file())
    there = {path.relative_to(models_dir / STAGE1).as_posix() for path in files}
    for left in (models_dir / STAGE1 / ".cache" / "huggingface").rglob("*.incomplete"):
        left.unlink()  # Between two files there is none either.
    hub.sent.clear()
    partly = runner.invoke(app, ["models", "check", str(models_dir)])
    assert partly.exit_code == 1
    assert "a download was cut short" in " ".join(partly.stderr.split())
    done = fetch(hub, models_dir)
    assert done.returncode == 0, done.stderr
    assert (models_dir / STAGE1 / name).read_bytes() == body
    sent = {"/".join(each.split("/")[2:]) for each in hub.sent if "IF-I-XL" in each}
    assert name in sent
    assert not sent & there

    config = models_dir / STAGE1 / "unet" / "config.json"
    told = config.read_text()
    config.write_text("{}")
    (models_dir / STAGE1 / name).write_bytes(body[:-50])
    bad = runner.invoke(app, ["models", "check", str(models_dir)])
    assert bad.exit_code == 1
    assert "bytes; its header states" in " ".join(bad.stderr.split())
    mended = fetch(hub, models_dir)
    assert mended.returncode == 0, mended.stderr
    assert (models_dir / STAGE1 / name).read_bytes() == body
    assert config.read_text() == told


def test_what_a_killed_download_left_goes_before_room_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are never gone on with, and may be the room that the next try needs."""
    (tmp_path / "config.json").write_bytes(b"there")
    left = tmp_path / ".cache" / "huggingface" / "download" / "x.1234.incomplete"
    mark = tmp_path / ".cache" / UNFINISHED
    left.parent.mkdir(parents=True)
    for path in (left, mark):
        path.write_bytes(b"")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(50 if left.exists() else 100))
    files = [RepoSibling(rfilename="config.json", size=5), RepoSibling(rfilename="big", size=100)]
    make_room(tmp_path, files)
    assert mark.exists()
    with pytest.raises(FetchError, match="GB are to be fetched"):
        make_room(tmp_path, [*files, RepoSibling(rfilename="more", size=1)])


def test_one_process_at_a_time_fetches_into_a_folder(hub: Hub, tmp_path: Path) -> None:
    """Another one is told so and takes nothing from the one that is at it."""
    hub.stops = "DeepFloyd/IF-I-XL-v1.0/unet/config.json"
    with started(hub, tmp_path / "models") as process:
        wait_until(lambda: not hub.stops)
        second = fetch(hub, tmp_path / "models")
        hub.go_on.set()
        process.communicate(timeout=120)
    assert second.returncode == 1
    assert "another process is fetching into it" in " ".join(second.stderr.split())


def test_no_network_and_unknown_revisions_are_told(hub: Hub, tmp_path: Path) -> None:
    """Offline mode, a hub that does not answer, and a revision it does not have: each by name."""
    models_dir = tmp_path / "models"
    offline = fetch(hub, models_dir, HF_HUB_OFFLINE="1")
    assert (offline.returncode, "HF_HUB_OFFLINE is set" in offline.stderr) == (1, True)
    unanswered = fetch(hub, models_dir, HF_ENDPOINT="http://127.0.0.1:9")
    assert unanswered.returncode == 1
    assert "the same command goes on where it stopped" in " ".join(unanswered.stderr.split())
    unknown = fetch(hub, models_dir, "--revision", f"{STAGE1}=gone")
    assert (unknown.returncode, "has no revision 'gone'" in unknown.stderr) == (1, True)
    assert not models_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["fetch", "huge"], "nothing called 'huge' to fetch"),
        (["fetch", "if-ii-l", "--revision", "main"], "--revision is 'main'"),
        (["fetch", "if-ii-l", "--revision", "nano=main"], "must be FOLDER=REVISION"),
    ],
)
def test_what_cannot_be_fetched_is_refused(arguments: list[str], reason: str) -> None:
    """An unknown name or revision ends with 2 before anything is asked of a hub."""
    refused = runner.invoke(app, ["models", *arguments])
    assert refused.exit_code == 2
    assert reason in " ".join(refused.stderr.split())


def test_check_tells_what_is_there_by_hand_and_what_is_not(tmp_path: Path) -> None:
    """Sizes, variant, parameters and licence of each network; 1 where something is missing."""
    models_dir = deepfloyd.save_models(tmp_path / "models", "fp16")
    whole = runner.invoke(app, ["models", "check", str(models_dir)], env={"COLUMNS": "200"})
    assert whole.exit_code == 0, whole.output
    assert "fp16: F16 62,400, F32 8,192" in whole.stdout
    assert "put there by hand, instead of DeepFloyd/IF-I-XL-v1.0" in whole.stdout
    assert "non-commercial research only" in whole.stdout
    shutil.rmtree(models_dir / STAGE2)
    absent = runner.invoke(app, ["models", "check", str(models_dir)], env={"COLUMNS": "200"})
    assert absent.exit_code == 1
    assert f"{STAGE2}: absent" in absent.stdout
    assert "to adapt" not in absent.stdout
    assert f"{STAGE2} is not there" in " ".join(absent.stderr.split())


def test_a_source_that_is_not_readable_is_as_none(tmp_path: Path) -> None:
    """Where the note of a folder's origin is damaged the folder counts as put there by hand."""
    models_dir = deepfloyd.save_models(tmp_path / "models")
    (models_dir / CLIP / "source.json").write_text(json.dumps({"repository": "x"}))
    assert inspect(CLIP, models_dir).origin is None
