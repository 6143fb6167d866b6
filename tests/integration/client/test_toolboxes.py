"""docs/examples: adapters to IBM ART and VERONA, against the installed packages' interfaces."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from service.client import Client
from tests.support.listening import listening
from tests.support.paths import ROOT
from tests.support.serving import LABELS, PIXELS, PNG, Service, split

IMAGE = PIXELS.transpose(2, 0, 1).astype(np.float32) / 255
CAT = LABELS.index("cat")


def example(name: str, package: str) -> ModuleType:
    """The script of docs/examples; skips the test without the package that it adapts to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(package)
        spec = importlib.util.spec_from_file_location(name, ROOT / "docs/examples" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(data_dir=tmp_path)


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with listening(service) as running, Client(running.url) as found:
        yield found


def test_an_adapter_has_sixty_lines_at_most() -> None:
    """Each shows how little the interface needs."""
    for name in ("art_classifier.py", "verona_module.py"):
        assert len((ROOT / "docs/examples" / name).read_text().splitlines()) <= 60


def test_art_certifies_and_attacks_a_task(service: Service, client: Client) -> None:
    """Labels and radii are the service's, and a black-box attack of ART runs on the task."""
    module = example("art_classifier", "art.attacks.evasion")
    from art.attacks.evasion import HopSkipJump

    classifier = module.CertifiedClassifier(client, sigma=0.5)
    x = np.stack([IMAGE, IMAGE])
    labels, radii = classifier.certify(x, n=200)
    wanted = client.predict(PNG, sigma=0.5, n=200)
    assert labels.tolist() == [CAT, CAT]
    assert radii.tolist() == [wanted["radius"]] * 2
    assert classifier.predict(x).tolist() == [[0, 0, 1, 0]] * 2
    attack = HopSkipJump(classifier, max_iter=0, init_size=1, verbose=False)
    assert attack.generate(x[:1]).shape == (1, *classifier.input_shape)
    service.voter.votes = split
    assert classifier.certify(x[:1], n=200)[0].tolist() == [-1]
    assert classifier.predict(x[:1]).tolist() == [[0, 0, 0, 0]]


def test_the_art_adapter_refuses_what_it_could_not_vouch_for(client: Client) -> None:
    """Pixels off the grid, another shape, and a task that there is not."""
    module = example("art_classifier", "art.attacks.evasion")
    classifier = module.CertifiedClassifier(client)
    for shifted in (IMAGE[None] * 0.999, IMAGE[None] + 1):
        with pytest.raises(ValueError, match="grid of 1/255"):
            classifier.certify(shifted, n=200)
    with pytest.raises(ValueError, match=r"must be \(3, 8, 8\)"):
        classifier.predict(IMAGE[None, :, :4])
    with pytest.raises(ValueError, match="task = 'none': must be one of default"):
        module.CertifiedClassifier(client, "none")


def test_verona_estimates_the_largest_epsilon(service: Service, client: Client) -> None:
    """An estimator of VERONA finds the largest epsilon below the proven l-infinity radius."""
    module = example("verona_module", "ada_verona")
    from ada_verona import BinarySearchEpsilonValueEstimator, DataPoint, VerificationResult

    wanted = client.predict(PNG, n=200)
    proven = wanted["attack_norms"]["linf_gray_levels"] / 255
    epsilons = [proven * factor for factor in (0.25, 0.5, 0.999, 1.0, 2.0)]
    verifier = module.CertifiedModule(client, n=200)
    context = Context(DataPoint("0", CAT, tensor(IMAGE)))
    found = BinarySearchEpsilonValueEstimator(epsilons, verifier).compute_epsilon_value(context)
    assert (found.epsilon, found.verifier) == (epsilons[2], "vouchsafe [default]")
    assert {each.result for each in context.saved} == {
        VerificationResult.UNSAT,
        VerificationResult.TIMEOUT,
    }
    other = Context(DataPoint("1", 0, tensor(IMAGE)))
    assert verifier.verify(other, epsilons[0]).result == VerificationResult.SAT
    service.voter.votes = split
    abstaining = module.CertifiedModule(client, n=300)
    assert abstaining.verify(context, epsilons[0]).result == VerificationResult.TIMEOUT
    for data, reason in ((IMAGE + 1, "grid of 1/255"), (IMAGE[:, :4, :4], r"\(3,8,8\)")):
        with pytest.raises(ValueError, match=reason):
            verifier.verify(Context(DataPoint("2", CAT, tensor(data))), 0.1)


class Context:
    """What an estimator uses of VERONA's context: the picture, and a place for results."""

    def __init__(self, data_point: Any) -> None:
        self.data_point = data_point
        self.saved: list[Any] = []

    def save_result(self, status: Any) -> None:
        self.saved.append(status)

    def get_dict_for_epsilon_result(self) -> dict[str, Any]:
        return {"image_id": self.data_point.id}


def tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
