"""`vouchsafe verify` and `jwks`: from an image to its certificate, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from service.cli.main import app
from service.cli.predict import _save
from service.predictions.results import example
from tests.support.paths import ROOT

SHIP = ROOT / "docs" / "ship.png"
ROWS = ("--n", "60", "--n0", "10")
runner = CliRunner()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two images, their certificates, the public keys and the data directory."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copy(SHIP, folder / "ship.png")
    Image.open(SHIP).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "mirrored.png")
    ran = run(folder, "predict", "ship.png", "mirrored.png", *ROWS, "--certificate", "certificates")
    assert ran.exit_code == 0, ran.output
    (folder / "jwks.json").write_text(run(folder, "jwks").stdout)
    return folder


def run(home: Path, *arguments: str, data: str = "data") -> Result:
    """The command in this folder, whose data directory is `data` there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOUCHSAFE_DATA_DIR", str(home / data))
        patch.setenv("COLUMNS", "200")
        patch.chdir(home)
        return runner.invoke(app, arguments)


def lines(result: Result) -> dict[str, str]:
    """The printed checks: the line of each name."""
    return {line.split()[1]: line for line in result.stdout.splitlines()}


def test_several_images_have_a_folder_of_certificates(home: Path) -> None:
    """Each is named after its image and is about it."""
    files = sorted(path.name for path in (home / "certificates").iterdir())
    assert files == ["mirrored.png.json", "ship.png.json"]
    for name in ("ship", "mirrored"):
        ran = run(home, "verify", f"certificates/{name}.png.json", "--image", f"{name}.png")
        assert ran.exit_code == 0, ran.output


def test_every_check_passes_in_a_line_each(home: Path) -> None:
    """With image, task, keys and secret all of it is checked, the votes by computing them again."""
    ran = run(
        home, "verify", "certificates/ship.png.json", "--image", "ship.png", "--task", "default",
        "--jwks", "jwks.json", "--replay",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    checks = ["format", "document", "signature", "statistics", "model", "commitment", "image"]
    assert list(lines(ran)) == [*checks, "replay"]
    assert all(line.startswith("ok ") for line in ran.stdout.splitlines())
    assert lines(ran)["replay"].endswith("70 rows drawn again got the same votes")


def test_without_keys_only_the_signer_is_named(home: Path) -> None:
    """A certificate alone passes, and the line on its signature claims no more than it knows."""
    ran = run(home, "verify", "certificates/ship.png.json", data="none")
    assert ran.exit_code == 0
    assert re.search(r"^ok +signature +signed by key [\w-]{43}$", ran.stdout, re.MULTILINE)
    assert not (home / "none").exists()


def test_json_has_the_same_checks(home: Path) -> None:
    """One document, for programs."""
    ran = run(home, "verify", "certificates/ship.png.json", "--image", "mirrored.png", "--json")
    told = json.loads(ran.stdout)
    assert (ran.exit_code, told["passed"]) == (1, False)
    failed = [check for check in told["checks"] if not check["passed"]]
    assert [check["check"] for check in failed] == ["image"]
    assert "array_sha256" in failed[0]["detail"]


def test_another_services_keys_and_secret_are_refused(home: Path) -> None:
    """Keys of another data directory did not sign it, and its secret is not the committed one."""
    (home / "other.json").write_text(run(home, "jwks", data="other").stdout)
    ran = run(home, "verify", "certificates/ship.png.json", "--jwks", "other.json")
    assert ran.exit_code == 1
    assert lines(ran)["signature"].startswith("FAIL")
    assert lines(ran)["commitment"].startswith("FAIL")
    again = run(
        home, "verify", "certificates/ship.png.json", "--image", "ship.png", "--replay",
        data="other",
    )  # fmt: skip
    assert again.exit_code == 1
    assert "secret_commitment" in lines(again)["replay"]


def altered(home: Path, **sections: Any) -> str:
    """The name of a certificate that this data directory's own key signed, with other sections."""
    from service.config import Settings
    from service.secrets import load_secret
    from service.signing import SigningKeys, canonical

    secret = load_secret(home / "data")
    keys = SigningKeys.from_settings(Settings(data_dir=home / "data"), secret)
    document = json.loads((home / "certificates" / "ship.png.json").read_text())["document"]
    for name, fields in sections.items():
        document[name] |= fields
    text = json.dumps({"document": document, "jws": keys.sign(canonical(document))})
    (home / "altered.json").write_text(text)
    return "altered.json"


def test_a_replay_finds_votes_that_nobody_cast(home: Path) -> None:
    """A service that signs other votes than its rows gave is found out with its secret."""
    document = json.loads((home / "certificates" / "ship.png.json").read_text())["document"]
    (label,) = [
        name
        for name, votes in document["evidence"]["selection_counts"].items()
        if name == str(document["result"]["label_index"]) and votes > 1
    ]
    votes = document["evidence"]["selection_counts"]
    rival = "0" if label != "0" else "1"
    moved = {**votes, label: votes[label] - 1, rival: votes.get(rival, 0) + 1}
    name = altered(home, evidence={"selection_counts": moved})
    ran = run(home, "verify", name, "--image", "ship.png", "--jwks", "jwks.json", "--replay")
    assert ran.exit_code == 1
    assert [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("FAIL")] == [
        "replay"
    ]
    assert "the replay counts" in lines(ran)["replay"]


def test_a_replay_needs_the_same_numerics(home: Path) -> None:
    """Votes of another machine cannot be repeated here, and the difference is named."""
    from models.bundle import served_digest

    model = json.loads((home / "certificates" / "ship.png.json").read_text())["document"]["model"]
    numerics = {**model["numerics"], "device": "an abacus"}
    bundle = served_digest(model["task_digest"], numerics)
    name = altered(home, model={"numerics": numerics, "bundle": bundle})
    ran = run(home, "verify", name, "--image", "ship.png", "--replay")
    assert ran.exit_code == 1
    assert "device 'an abacus', here " in lines(ran)["replay"]


def test_keys_come_from_an_address_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--jwks` fetches what a service publishes; an error there says nothing of the certificate."""
    served = {"https://service/jwks": 200, "https://service/gone": 404}

    def get(url: str, **_: Any) -> httpx.Response:
        content = (home / "jwks.json").read_bytes()
        return httpx.Response(served[url], content=content, request=httpx.Request("GET", url))

    monkeypatch.setattr("httpx.get", get)
    ran = run(home, "verify", "certificates/ship.png.json", "--jwks", "https://service/jwks")
    assert ran.exit_code == 0
    assert " of the JWKS" in lines(ran)["signature"]
    ran = run(home, "verify", "certificates/ship.png.json", "--jwks", "https://service/gone")
    assert (ran.exit_code, "404" in ran.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--replay"], "--replay needs --image"),
        (["--jwks", "ship.png"], "ship.png: "),
        (["--jwks", "http://127.0.0.1:9/"], "http://127.0.0.1:9/: "),
        (["--task", "../x"], "is no task's id"),
    ],
)
def test_what_cannot_be_used_is_an_error(home: Path, options: list[str], reason: str) -> None:
    """A wrong option ends with 2 and one line, for it says nothing of the certificate."""
    ran = run(home, "verify", "certificates/ship.png.json", *options)
    assert ran.exit_code == 2, ran.output
    assert reason in ran.stderr


def test_a_file_that_is_no_certificate_fails(home: Path) -> None:
    """Any other file fails the first check."""
    ran = run(home, "verify", "ship.png")
    assert ran.exit_code == 1
    assert list(lines(ran)) == ["format"]


def test_what_is_not_certified_writes_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer without a certificate is said, and leaves no file."""
    abstained = example().model_copy(update={"certificate": None})
    _save(tmp_path / "none.json", Path("noise.png"), abstained)
    assert "noise.png: not certified, so" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_a_mode_without_a_radius_has_no_certificate(home: Path) -> None:
    """Asking for both is an error before any work."""
    ran = run(home, "predict", "ship.png", "--mode", "predict", "--certificate", "none.json")
    assert ran.exit_code == 2
    assert "--certificate needs --mode certify" in ran.stderr


def test_two_images_of_one_name_are_refused(home: Path) -> None:
    """Their certificates would be one file; this is found before any work."""
    (home / "more").mkdir(exist_ok=True)
    shutil.copy(SHIP, home / "more" / "ship.png")
    ran = run(home, "predict", "ship.png", "more/ship.png", "--certificate", "certificates")
    assert ran.exit_code == 2
    assert "two images would have the certificate ship.png.json" in ran.stderr


def test_a_missing_folder_is_found_before_any_work(home: Path) -> None:
    """The file of one certificate needs its folder."""
    ran = run(home, "predict", "ship.png", "--certificate", "nowhere/ship.json")
    assert ran.exit_code == 2
    assert "there is no folder nowhere" in ran.stderr
