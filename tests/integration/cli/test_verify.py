"""`vouchsafe verify` and `jwks`: from an image to its certificate, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from base64 import urlsafe_b64encode
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from service.cli.main import app
from service.cli.predict import _save
from service.predictions.results import example
from service.secrets import load_secret, load_signing_key
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
    """A certificate alone does not fail, and neither does one whose signature is false."""
    given = json.loads((home / "certificates" / "ship.png.json").read_text())
    head, payload, _ = given["jws"].split(".")
    forged = {**given, "jws": f"{head}.{payload}.{'A' * 86}"}
    (home / "forged.json").write_text(json.dumps(forged))
    says = r"^--   signature +not checked: says it is signed by key [\w-]{43} \(give --jwks\)$"
    for name in ("certificates/ship.png.json", "forged.json"):
        ran = run(home, "verify", name, data="none")
        assert ran.exit_code == 0
        assert re.search(says, ran.stdout, re.MULTILINE)
        told = json.loads(run(home, "verify", name, "--json", data="none").stdout)
        passed = {check["check"]: check["passed"] for check in told["checks"]}
        assert (told["passed"], passed.pop("signature")) == (None, None)
        assert set(passed.values()) == {True}
    assert not (home / "none").exists()
    assert run(home, "verify", "forged.json", "--jwks", "jwks.json").exit_code == 1


def test_a_key_id_that_cannot_be_printed_fails(home: Path) -> None:
    """A surrogate in the header is no key id, and no crash of the output."""
    given = json.loads((home / "certificates" / "ship.png.json").read_text())
    head = urlsafe_b64encode(b'{"alg":"EdDSA","kid":"\\ud800"}').rstrip(b"=").decode()
    odd = {**given, "jws": ".".join([head, *given["jws"].split(".")[1:]])}
    (home / "odd.json").write_text(json.dumps(odd))
    ran = run(home, "verify", "odd.json", "--json")
    (check,) = json.loads(ran.stdout)["checks"]
    assert (ran.exit_code, check["passed"]) == (1, False)
    assert "kid is " in check["detail"]


def test_a_file_that_is_too_long_fails(home: Path) -> None:
    """No more is read of it than a certificate can have."""
    (home / "long.json").write_bytes(b" " * 2**22)
    assert "at most 2097152 bytes" in run(home, "verify", "long.json").stdout


def test_jwks_makes_no_secrets(home: Path) -> None:
    """In a wrong directory there are no keys to print, and none are made."""
    ran = run(home, "jwks", data="wrong")
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "noise.secret: is missing" in ran.stderr
    assert not (home / "wrong").exists()
    (home / "half").mkdir()
    (home / "half" / "noise.secret").write_bytes(b"h" * 32)
    ran = run(home, "jwks", data="half")
    assert (ran.exit_code, "signing.key: is missing" in ran.stderr) == (2, True)
    assert [each.name for each in (home / "half").iterdir()] == ["noise.secret"]


def test_json_has_the_same_checks(home: Path) -> None:
    """One document, for programs."""
    ran = run(home, "verify", "certificates/ship.png.json", "--image", "mirrored.png", "--json")
    told = json.loads(ran.stdout)
    assert (ran.exit_code, told["passed"]) == (1, False)
    failed = [check for check in told["checks"] if check["passed"] is False]
    assert [check["check"] for check in failed] == ["image"]
    assert "array_sha256" in failed[0]["detail"]


def test_another_services_keys_and_secret_are_refused(home: Path) -> None:
    """Keys of another data directory did not sign it, and its secret is not the committed one."""
    load_secret(home / "other")
    load_signing_key(home / "other")
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


def served(monkeypatch: pytest.MonkeyPatch, answers: dict[str, httpx.Response]) -> None:
    """Let the command's requests be answered from here; any other address is a failure."""
    transport = httpx.MockTransport(lambda request: answers[str(request.url)])
    monkeypatch.setattr("httpx.Client", partial(httpx.Client, transport=transport))


def to(url: str) -> httpx.Response:
    return httpx.Response(302, headers={"location": url})


def test_keys_come_from_an_address_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--jwks` fetches what a service publishes, over https or from this machine."""
    content = (home / "jwks.json").read_bytes()
    addresses = ("https://service/jwks", "http://127.0.0.1:8000/jwks", "http://[::1]/jwks",
                 "http://localhost/jwks")  # fmt: skip
    answers = {url: httpx.Response(200, content=content) for url in addresses}
    served(monkeypatch, answers | {"https://service/old": to(addresses[0])})
    for url in (*addresses, "https://service/old"):
        ran = run(home, "verify", "certificates/ship.png.json", "--jwks", url)
        assert ran.exit_code == 0, ran.output
        assert " of the JWKS" in lines(ran)["signature"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://service/gone", "404"),
        ("http://service/jwks", "http://service/jwks: keys are fetched over https"),
        ("HTTP://127.0.0.1.service/jwks", "keys are fetched over https"),
        ("https://service/plain", "http://service/jwks: keys are fetched over https"),
        ("https://service/local", "http://127.0.0.1/jwks: keys are fetched over https"),
        ("http://127.0.0.1/plain", "http://service/jwks: keys are fetched over https"),
        ("https://service/long", "at most 1048576 bytes"),
    ],
)
def test_an_address_that_cannot_be_trusted_is_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    """Plain http to another machine, also by a redirect, and a flood say nothing of the keys."""
    content = (home / "jwks.json").read_bytes()
    answers = {
        "https://service/gone": httpx.Response(404),
        "https://service/plain": to("http://service/jwks"),
        "https://service/local": to("http://127.0.0.1/jwks"),
        "http://127.0.0.1/plain": to("http://service/jwks"),
        "https://service/long": httpx.Response(200, content=content + b" " * 2**20),
    }
    plain = ("http://service/jwks", "http://127.0.0.1/jwks", "http://127.0.0.1.service/jwks")
    served(monkeypatch, answers | {each: httpx.Response(200, content=content) for each in plain})
    ran = run(home, "verify", "certificates/ship.png.json", "--jwks", url)
    assert ran.exit_code == 2, ran.output
    assert reason in ran.stderr


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
