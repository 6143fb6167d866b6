"""Image towers of our own, as timm and open_clip meet them."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.zoo import vision


def test_timm_builds_airbench_by_name() -> None:
    """The registered name gives features or logits, at the cost that its docstring states."""
    network = timm.create_model("airbench94", num_classes=7).eval()
    assert isinstance(network, vision.Airbench)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert network(x).shape == (2, 7)
    assert counter.get_total_flops() / 2 / len(x) == pytest.approx(0.12e9, rel=0.05)
    network.reset_classifier(0)
    assert network(x).shape == (2, 256)
    with pytest.raises(ValueError, match=r"global_pool='avg': this network has 'max' only"):
        network.reset_classifier(0, "avg")


def test_whitened_patches_are_white() -> None:
    """After `whiten` the stem's first twelve channels are uncorrelated, of unit variance, and the
    other twelve their negatives."""
    torch.manual_seed(0)
    mixing = torch.randn(3, 3)
    images = torch.einsum("cd,ndhw->nchw", mixing, torch.randn(200, 3, 32, 32))
    network = timm.create_model("airbench94")
    network.whiten(images)
    with torch.no_grad():
        out = network.stem(images).permute(1, 0, 2, 3).reshape(24, -1)
    first, second = out[:12], out[12:]
    assert torch.allclose(first @ first.T / first.shape[1], torch.eye(12), atol=0.05)
    assert torch.equal(first, -second)
