"""The command `models add`: which networks become a task, what it says, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from models.adaptation.plan import Plan
from models.bundle import read_bundle
from models.classifiers.timm import read_timm
from models.denoisers import registry
from models.runtime import Torch
from models.smoothing import load, numerics
from models.zoo.own import Registration
from service.cli.adapt import open_store
from service.cli.main import app
from service.config import Settings
from tests.support import miniatures, own_networks
from tests.support.paths import ROOT

runner = CliRunner()
SHIP = str(ROOT / "docs" / "ship.png")
LABELS = own_networks.NAMES


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind of network."""
    root = tmp_path_factory.mktemp("networks")
    own_networks.save_vit(root / "vit")
    own_networks.save_clip(root / "clip")
    own_networks.save_onnx(root / "onnx")
    own_networks.save_ffdnet(root / "ffdnet")
    own_networks.save_unconditional(root / "unconditional")
    miniatures.save_timm(root / "timm")
    miniatures.save_open_clip(root / "open-clip")
    miniatures.save_cascade(root / "cascade")
    own_networks.save_onnx_parts(root)
    (root / "ffdnet.pth").write_bytes(b"pickled")
    (root / "labels.txt").write_text("\n".join(LABELS))
    return root


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, networks: Path) -> Path:
    """A data folder of the test's own, beside which the networks lie."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(networks)
    return tmp_path / "data"


def add(name: str, classifier: str, *options: str) -> Result:
    return runner.invoke(app, ["models", "add", name, "--classifier", classifier, *options])


def refused(result: Result, reason: str, data: Path) -> None:
    """The command has ended with 2 and this reason, and has left nothing."""
    assert result.exit_code == 2, result.output
    assert reason in result.stderr
    assert "/vouchsafe-" not in result.stderr  # Copies are gone when a user reads of them.
    assert ".partial-" not in result.stderr
    left = [path for path in data.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert [path.name for path in left] in ([], ["noise.secret"])


SIXTEEN = ("--k=1.5", "--resolution=16")
CASES = {
    "vit behind nano": ("transformers:vit", ("--denoiser", "nano"), 32, 1.0, 1.8),
    "onnx alone": ("onnx:onnx/model.onnx", (), 48, 1.0, 1.0),
    "timm behind ffdnet": (
        "timm:timm",
        ("--denoiser", "ffdnet:ffdnet", "--largest-sigma", "0.25"),
        48,
        0.25,
        1.0,
    ),
    "clip behind an unconditional model": (
        "transformers:clip",
        ("--denoiser", "unconditional:unconditional", "--labels", "labels.txt"),
        32,
        1.0,
        1.0,
    ),
    "open_clip behind a cascade": (
        "open-clip:open-clip",
        (
            "--denoiser=super-resolution:cascade",
            "--labels=labels.txt",
            "--k=1.5",
            "--resolution=16",
        ),
        16,
        1.0,
        1.5,
    ),
}


@pytest.mark.parametrize(
    ("classifier", "options", "resolution", "largest", "k"), CASES.values(), ids=CASES
)
def test_networks_become_a_task(
    classifier: str,
    options: tuple[str, ...],
    resolution: int,
    largest: float,
    k: float,
    data: Path,
) -> None:
    """Every kind becomes a task that loads, with the settings of its folder or those given."""
    result = add("mine", classifier, *options)
    assert result.exit_code == 0, result.output
    assert f"{resolution} x {resolution} pixels" in result.stdout
    assert "rows a second" in result.stdout
    assert "GiB of this process" in result.stdout
    assert data.stat().st_mode & 0o777 == 0o700
    assert not (data / "noise.secret").exists()  # A worker's container has none.
    bundle = read_bundle(data / "tasks" / "mine")
    assert (bundle.id, bundle.labels, bundle.adaptation) == ("mine", LABELS, {})
    assert (bundle.resolution, bundle.largest_sigma, bundle.k) == (resolution, largest, k)
    model = load(bundle, models_dir=Settings().models_folder)
    machine = numerics(Torch())[0]
    assert model.digest == bundle.served_digest(bundle.numerics(machine).described())
    assert ("onnxruntime 1." in model.numerics.runtime) == classifier.startswith("onnx")


def test_the_other_commands_know_it(data: Path) -> None:
    """It is listed, shown, verified, asked and removed like any task; with it go its networks."""
    assert add("mine", "transformers:vit", "--denoiser", "nano").exit_code == 0
    assert add("mine", "transformers:vit").exit_code == 2
    listed = json.loads(runner.invoke(app, ["models", "list", "--json"]).stdout)
    assert [task["id"] for task in listed] == ["default", "mine"]
    shown = json.loads(runner.invoke(app, ["models", "show", "mine", "--json"]).stdout)
    assert shown["settings"] == {"denoiser": "super-resolution", "classifier": "transformers"}
    asked = ["predict", SHIP, "--task", "mine", "--n", "20", "--n0", "5", "--json"]
    assert json.loads(runner.invoke(app, asked).stdout)["label"] in (*LABELS, None)
    own = data / "models" / "own" / "mine"
    with (own / "classifier" / "model.safetensors").open("ab") as weights:
        weights.write(b"\0")
    verified = runner.invoke(app, ["models", "verify", "mine"])
    assert verified.exit_code == 1
    assert "'model.safetensors' does not have the hash" in verified.stderr
    assert runner.invoke(app, ["models", "remove", "mine"]).exit_code == 0
    assert not own.exists()
    assert not (data / "tasks" / "mine").exists()


def test_networks_of_another_task_stay(data: Path) -> None:
    """A task whose networks another one uses is not removed, and the other one is named."""
    add("mine", "onnx:onnx")
    shutil.copytree(data / "tasks" / "mine", data / "tasks" / "other")
    removed = runner.invoke(app, ["models", "remove", "mine"])
    assert removed.exit_code == 1
    assert "the networks of mine are those of other" in removed.stderr
    assert (data / "tasks" / "mine").exists()


def test_networks_of_a_task_in_the_making_stay(data: Path) -> None:
    """A job would run to its end, and its task would then lack its classifier."""
    add("mine", "transformers:vit")
    settings = Settings()
    plan = Plan.checked(LABELS, classifier="mine", models_dir=settings.models_folder)
    task = open_store(settings).create(plan, "pets", None)
    removed = runner.invoke(app, ["models", "remove", "mine"])
    assert f"the networks of mine are those of {task.id}" in removed.stderr
    assert runner.invoke(app, ["models", "remove", task.id]).exit_code == 0
    assert runner.invoke(app, ["models", "remove", "mine"]).exit_code == 0


def test_networks_without_their_task_are_removed(data: Path) -> None:
    """Networks whose task is gone, as by a DELETE over HTTP, can still be removed."""
    add("mine", "onnx:onnx")
    shutil.rmtree(data / "tasks" / "mine")
    assert "is taken" in add("mine", "onnx:onnx").stderr
    assert runner.invoke(app, ["models", "remove", "mine"]).exit_code == 0
    assert add("mine", "onnx:onnx").exit_code == 0


def test_what_was_added_is_registered(data: Path) -> None:
    """Labels of its own bind a classifier; a zero-shot head takes any words."""
    add("fixed", "transformers:vit", "--denoiser", "ffdnet:ffdnet/model.safetensors")
    add("words", "transformers:clip", "--labels", "labels.txt")
    fixed, words = (Registration.read(data / "models" / "own" / n) for n in ("fixed", "words"))
    assert fixed is not None
    assert words is not None
    assert (fixed.labels, fixed.denoiser) == (LABELS, "ffdnet")
    assert (words.labels, words.denoiser) == (None, None)


@pytest.mark.parametrize(
    ("classifier", "options", "reason"),
    [
        ("torchvision:vit", (), "it must be KIND:PATH with a kind of"),
        ("timm", (), "it must be timm:PATH"),
        ("timm:nowhere", (), "--classifier: there is no nowhere"),
        ("timm:vit", (), "its configuration is not one of timm (KeyError: 'pretrained_cfg')"),
        ("timm:vit/model.safetensors", (), "is a file; timm takes a folder"),
        ("onnx:listed/net.onnx", (), "classifier/model.json: holds no JSON object"),
        ("onnx:split/net.onnx", (), "its weights must be in the file itself"),
        ("onnx:onnx", ("--denoiser", "ffdnet:ffdnet.pth"), "of pickled weights, which are never"),
        ("onnx:onnx", ("--denoiser", "ffdnet:timm"), "denoiser/model.safetensors: is not a color"),
        ("onnx:vit", (), "vit has no model.onnx, which onnx needs"),
        ("transformers:clip", (), "--labels is missing: transformers:clip names no labels"),
        ("onnx:onnx", ("--denoiser", "none:onnx"), "it must be none alone"),
        ("onnx:onnx", ("--denoiser", "nanno"), "There is no denoiser set"),
        ("onnx:onnx", ("--k", "2"), "--k is 2.0 for the denoiser none"),
        ("onnx:onnx", ("--resolution", "4"), "--resolution is 4; it must be 8 to 2048 pixels"),
        ("onnx:onnx", ("--largest-sigma", "9"), "--largest-sigma is 9.0; it must be 0.02 to 4.0"),
        ("onnx:onnx", ("--template", "a photo"), "template must hold {} once"),
    ],
)
def test_bad_options_name_field_value_and_limit(
    classifier: str, options: tuple[str, ...], reason: str, data: Path
) -> None:
    """A wrong option ends the command with one line about it, and leaves nothing behind."""
    refused(add("mine", classifier, *options), reason, data)


@pytest.mark.parametrize("name", ["default", "nano", "a/b", "..", "x" * 65])
def test_names_that_may_not_be_registered(name: str, data: Path) -> None:
    """A name is a task's id, and none of the project's own names."""
    refused(add(name, "onnx:onnx"), f"the name {name!r} cannot be registered", data)


def test_what_is_printed_of_the_networks_is_their_own(networks: Path) -> None:
    """Parameters are those that training changes, without batch normalization's statistics."""
    network = read_timm(networks / "timm")
    assert any("running_mean" in name for name in network.state_dict())
    count = sum(parameter.numel() for parameter in network.parameters())
    assert f"timm, {count:,} parameters" in add("mine", "timm:timm").stdout


def test_labels_must_be_as_many_as_classes(tmp_path: Path, data: Path) -> None:
    """A labels file of another length is refused with both numbers."""
    (tmp_path / "two").write_text("cat\ndog\n")
    result = add("mine", "timm:timm", "--labels", str(tmp_path / "two"))
    refused(
        result, "vouchsafe: classifier: the network has 3 classes, and there are 2 labels", data
    )


def test_pickles_are_never_read(networks: Path, tmp_path: Path, data: Path) -> None:
    """A folder with pickled weights alone is refused by their name; beside others they stay."""
    folder = tmp_path / "vit"
    shutil.copytree(networks / "vit", folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert add("mine", f"transformers:{folder}").exit_code == 0
    assert not list(data.rglob("*.bin"))
    runner.invoke(app, ["models", "remove", "mine"])
    (folder / "model.safetensors").unlink()
    result = add("mine", f"transformers:{folder}")
    refused(result, "pytorch_model.bin is a pickle, which is never read", data)


def test_cut_weights_are_refused(networks: Path, tmp_path: Path, data: Path) -> None:
    """A file that was cut short is refused before anything is loaded."""
    shutil.copytree(networks / "timm", tmp_path / "timm")
    weights = tmp_path / "timm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    refused(add("mine", f"timm:{tmp_path / 'timm'}"), "its header states", data)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("hf-hub:timm/resnet18", "timm has no architecture 'hf-hub:timm/resnet18'"),
        ("resnet18", "RuntimeError: Error(s) in loading state_dict for ResNet"),
    ],
)
def test_another_architecture_is_refused(
    architecture: str, reason: str, networks: Path, tmp_path: Path, data: Path
) -> None:
    """In one line, and without a look at the hub."""
    shutil.copytree(networks / "timm", tmp_path / "timm")
    described = json.loads((tmp_path / "timm" / "config.json").read_text())
    changed = json.dumps(described | {"architecture": architecture})
    (tmp_path / "timm" / "config.json").write_text(changed)
    result = add("mine", f"timm:{tmp_path / 'timm'}")
    refused(result, reason, data)
    assert result.stderr.count("\n") == 1


def test_a_tilde_is_the_home_folder(networks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it after a colon."""
    monkeypatch.setenv("HOME", str(networks))
    assert add("mine", "timm:~/timm").exit_code == 0


def test_missing_weights_are_refused(networks: Path, tmp_path: Path, data: Path) -> None:
    """A head without its last layer is refused; the library would draw it at random."""
    shutil.copytree(networks / "vit", tmp_path / "vit")
    weights = tmp_path / "vit" / "model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if not k.startswith("classifier.")}
    save_file(kept, weights, {"format": "pt"})
    result = add("mine", f"transformers:{tmp_path / 'vit'}")
    refused(result, "the weights lack 2 of ViTForImageClassification's", data)


def test_rows_that_touch_one_another_are_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network whose answer to a row depends on the row's place is refused."""

    class Placing:
        largest_sigma = 1.0

        def __call__(self, x_hat: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return torch.linspace(0, 1, len(x_hat))[:, None, None, None].expand_as(x_hat)

    monkeypatch.setitem(registry.DENOISERS, "none", lambda *_: Placing())
    refused(add("mine", "timm:timm"), "must not affect one another", data)
