"""Bundles: written atomically, read suspiciously."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.adaptation.tunables import TUNABLES
from models.bundle import (
    Base,
    Bundle,
    BundleError,
    read_bundle,
    write_bundle,
)
from models.classifiers.registry import CLASSIFIERS
from models.denoisers.registry import DENOISERS
from models.files import sha256_of
from models.kinds import CLASSIFIER_FILES, DENOISER_FILES, TUNABLE_KINDS


@pytest.fixture
def written(tmp_path: Path) -> Bundle:
    """A bundle of one small file, published under tmp_path/tasks/pets."""
    states = tmp_path / "states.safetensors"
    save_file({"states": torch.zeros(2, 3)}, states)
    pets = Bundle(
        id="pets",
        labels=("cat", "dog"),
        template="a {}",
        prompt="a  ",
        k=1.8,
        resolution=32,
        largest_sigma=1.0,
        denoiser=Base("none"),
        classifier=Base("timm"),
        licence="none",
        files={},
    )
    return write_bundle(tmp_path / "tasks" / "pets", pets, {"prompt_states.safetensors": states})


def rewrite(bundle: Bundle, **changes: object) -> None:
    path = bundle.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_written_is_read(written: Bundle) -> None:
    """A bundle survives the disk, digest included, and nothing else lies beside it."""
    assert read_bundle(written.folder) == written
    assert read_bundle(written.folder).digest == written.digest
    assert {path.name for path in written.folder.parent.iterdir()} == {"pets", ".lock"}


def test_digest_covers_settings_files_and_numerics(written: Bundle) -> None:
    """Another setting, file or numerics is another digest."""
    assert replace(written, k=1.9).digest != written.digest
    assert replace(written, files={}).digest != written.digest
    assert written.served_digest({"dtype": "bfloat16"}) != written.served_digest({})


def test_an_existing_bundle_is_not_overwritten(written: Bundle) -> None:
    """Publishing over a folder is refused and leaves no partial copy."""
    with pytest.raises(BundleError, match="exists already"):
        write_bundle(written.folder, written, {})
    assert len(list(written.folder.parent.iterdir())) == 2


def test_a_failed_write_leaves_nothing(written: Bundle, tmp_path: Path) -> None:
    """Where a source is missing, neither the bundle nor its temporary copy remains."""
    with pytest.raises(FileNotFoundError):
        write_bundle(tmp_path / "tasks" / "new", written, {"a.safetensors": tmp_path / "absent"})
    assert {path.name for path in written.folder.parent.iterdir()} == {"pets", ".lock"}


def test_wrong_hash_is_refused_by_name(written: Bundle) -> None:
    """A changed byte is found, and the file named."""
    file = written.folder / "prompt_states.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match=r"'prompt_states\.safetensors' does not have the hash"):
        read_bundle(written.folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a\\..\\x.safetensors"])
def test_paths_that_leave_the_folder_are_refused(written: Bundle, name: str) -> None:
    """No file outside the folder is ever opened."""
    rewrite(written, files={name: "0" * 64})
    with pytest.raises(BundleError, match="leaves the folder"):
        read_bundle(written.folder)


def test_links_are_refused(written: Bundle, tmp_path: Path) -> None:
    """A link is refused even where what it points to has the right hash."""
    file = written.folder / "prompt_states.safetensors"
    elsewhere = tmp_path / "elsewhere.safetensors"
    os.rename(file, elsewhere)
    file.symlink_to(elsewhere)
    assert sha256_of(file) == written.files["prompt_states.safetensors"]
    with pytest.raises(BundleError, match="is a link"):
        read_bundle(written.folder)


def test_pickles_are_refused(written: Bundle) -> None:
    """Only safetensors files may belong to a bundle."""
    rewrite(written, files={"weights.bin": "0" * 64})
    with pytest.raises(BundleError, match=r"'weights\.bin' is not a safetensors file"):
        read_bundle(written.folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 3}, "schema version 3; this release reads 1, 2"),
        ({"colour": "red"}, "unknown or missing fields colour"),
        ({"files": {"absent.safetensors": "0"}}, "'absent.safetensors' is missing"),
        ({"largest_sigma": float("inf")}, "Infinity is not a number"),
        ({"k": float("nan")}, "NaN is not a number"),
        ({"k": "1.8"}, "the field k holds '1.8'"),
        ({"labels": "cat"}, "the field labels holds 'cat'"),
        ({"labels": ["cat", 1]}, "the field labels holds"),
        ({"labels": ["cat"]}, "the field labels holds 1; the smallest is 2"),
        ({"labels": ["cat", "dog", "cat"]}, "the field labels holds 'cat' twice"),
        ({"denoiser": asdict(Base("other"))}, "the denoiser is 'other', not of super-resolution"),
        (
            {"classifier": asdict(Base("other"))},
            "the classifier is 'other', not of onnx",
        ),
        (
            {"denoiser": asdict(Base("super-resolution")), "files": {}},
            r"the denoiser needs prompt_states\.safetensors, which is not listed",
        ),
        ({"figures": [1]}, "the field figures holds"),
        ({"prompts": ["cat"]}, "the field prompts holds"),
        ({"prompts": {"xylophone": "cat"}}, "the field prompts holds 'xylophone'"),
        ({"prompts": {"cat": 1}}, "the field prompts holds 'cat': '1'"),
        ({"adaptation": {"steps": 3}}, "was adapted with steps, but lists no adapter"),
        ({"adaptation": {"epochs": 3}}, "was adapted with epochs, but lists no classifier"),
    ],
)
def test_manifests_that_are_not_understood_are_refused(
    written: Bundle, changes: dict[str, object], reason: str
) -> None:
    """Unknown versions and fields, and missing files, are named."""
    rewrite(written, **changes)
    with pytest.raises(BundleError, match=reason):
        read_bundle(written.folder)


def test_a_base_network_that_changed_is_refused(tmp_path: Path) -> None:
    """A bundle does not run on weights other than those it was made with."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    base = Base.of("timm", str(tmp_path), ["*.safetensors"])
    assert base.verified(tmp_path) == tmp_path
    weights.write_bytes(b"two")
    with pytest.raises(BundleError, match="does not have the hash"):
        base.verified(tmp_path)
    weights.unlink()
    with pytest.raises(BundleError, match="is missing"):
        base.verified(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"k": ' + "1" * 5_000 + "}", "{", "\\xff"])
def test_what_is_no_manifest_is_refused_by_name(written: Bundle, text: str) -> None:
    """Nesting too deep, a number too long and a text cut short end in the same error."""
    (written.folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="cannot be read"):
        read_bundle(written.folder)


def test_the_digest_is_of_what_can_change_an_answer(written: Bundle) -> None:
    """Another name and other figures leave it, for they would draw other noise for the same
    networks; anything else does not."""
    assert replace(written, name="other", figures={"ACR": 1}).digest == written.digest
    assert replace(written, k=1.0).digest != written.digest
    assert replace(written, prompt="other").digest != written.digest
    assert replace(written, prompts={"cat": "other"}).digest != written.digest


def test_prompts_are_only_written_where_they_differ(written: Bundle) -> None:
    """Where none differs the manifest lacks them, as it did in earlier releases, and the digest is
    of that manifest; the words in the template are the labels."""
    described = json.loads((written.folder / "manifest.json").read_text())
    assert "prompts" not in described
    del described["name"], described["figures"]
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":")).encode()
    assert read_bundle(written.folder).digest == hashlib.sha256(canonical).hexdigest()
    assert read_bundle(written.folder).words == ("cat", "dog")
    rewrite(written, prompts={"cat": "feline"})
    assert read_bundle(written.folder).words == ("feline", "dog")


def test_a_manifest_of_the_first_schema_is_read(written: Bundle) -> None:
    """It knew neither a name nor an adaptation; what it says now has the same digest."""
    manifest = written.folder / "manifest.json"
    described = json.loads(manifest.read_text())
    for later in ("name", "adaptation"):
        del described[later]
    manifest.write_text(json.dumps({**described, "schema": 1}))
    read = read_bundle(written.folder)
    assert (read.name, read.adaptation) == ("", {})
    assert read.digest == written.digest


@pytest.mark.parametrize("folder", ["../elsewhere", "nano/../../elsewhere", "/etc", "nano\\x"])
def test_a_base_network_elsewhere_is_refused_by_name(folder: str) -> None:
    """Base networks lie in the package or the models directory, without a way around."""
    base = Base("timm", folder, {"model.safetensors": "0" * 64})
    for use in (lambda: base.verified(), lambda: base.opened().__enter__()):
        with pytest.raises(BundleError, match="the base network's folder") as caught:
            use()
        assert repr(folder) in str(caught.value)


def test_a_base_network_reached_by_a_link_is_refused(tmp_path: Path) -> None:
    """A link below the models directory is refused, the models directory itself may be one."""
    real, linked = tmp_path / "real", tmp_path / "models"
    (real / "net").mkdir(parents=True)
    (real / "net" / "model.safetensors").write_bytes(b"one")
    linked.symlink_to(real)
    base = Base.of("timm", str(real / "net"), ["*"])
    assert base.verified(linked) == real / "net"
    (real / "other").symlink_to(real / "net")
    with pytest.raises(BundleError, match="is reached by a link"):
        replace(base, folder=str(real / "other")).verified(linked)


def test_what_is_loaded_is_what_was_hashed(tmp_path: Path) -> None:
    """A file that changes after its hash was checked changes nothing of what is loaded, and one
    that changed before is refused."""
    weights = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(3)}, weights)
    base = Base.of("timm", str(tmp_path), ["*.safetensors"])
    with base.opened(tmp_path) as copies:
        save_file({"w": torch.ones(3)}, weights)
        loaded = load_file(copies / "model.safetensors")["w"]
    assert loaded.tolist() == [0.0, 0.0, 0.0]
    with (
        pytest.raises(BundleError, match=r"'model\.safetensors' does not have the hash"),
        base.opened(tmp_path),
    ):
        pass


def test_every_kind_of_network_may_be_named() -> None:
    """Manifests may name exactly the adapters that there are."""
    assert DENOISER_FILES.keys() == DENOISERS.keys()
    assert CLASSIFIER_FILES.keys() == CLASSIFIERS.keys()
    assert set(TUNABLE_KINDS) == TUNABLES.keys()
