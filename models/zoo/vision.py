"""Image towers that timm lacks, each registered with timm under its name."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class _Group(nn.Module):
    """Two 3x3 convolutions; max pooling halves the first one's output in size."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.act = nn.GELU()
        with torch.no_grad():
            for conv in (self.conv1, self.conv2):
                nn.init.dirac_(conv.weight[: conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.pool(self.conv1(x))))
        out: Tensor = self.act(self.norm2(self.conv2(x)))
        return out


class Airbench(nn.Module):
    """A fast-training network for 32x32 images: 2.0 M parameters, 0.12 G multiply-adds.

    x (B,3,32,32), normalized -> features (B,256), or logits (B,num_classes). The first convolution
    should hold the whitening of 2x2 patches (`whiten`), and stay fixed. Source: Jordan, "94% on
    CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498.
    """

    def __init__(self, num_classes: int = 10, global_pool: str = "max", in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 256
        self.stem = nn.Conv2d(in_chans, 24, 2)
        self.act = nn.GELU()
        self.groups = nn.Sequential(_Group(24, 64), _Group(64, 256), _Group(256, 256))
        self.pool = nn.MaxPool2d(3)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new linear layer to `num_classes`, or by none for 0 (timm's
        interface).
        """
        if global_pool not in (None, "max"):
            raise ValueError(f"global_pool={global_pool!r}: this network has 'max' only")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features (B,256), or logits."""
        out: Tensor = self.head(self.pool(self.groups(self.act(self.stem(x)))).flatten(1))
        return out

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Make the stem whiten 2x2 patches, once with each sign; images (N,3,32,32), normalized."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
        self.stem.weight.copy_(torch.cat([filters, -filters]))
        self.stem.bias.zero_()  # type: ignore[union-attr]


default_cfgs = generate_default_cfgs(
    {
        "airbench94": {
            "input_size": (3, 32, 32),
            "pool_size": (1, 1),
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "first_conv": "stem",
            "classifier": "head",
        }
    }
)


@register_model
def airbench94(pretrained: bool = False, **described: Any) -> Airbench:
    """`timm.create_model("airbench94")`; there are no pretrained weights to fetch."""
    built: Airbench = build_model_with_cfg(Airbench, "airbench94", pretrained, **described)
    return built
