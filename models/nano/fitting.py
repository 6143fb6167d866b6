"""The training loop that every part of nano shares: seeded, logged, resumable to the step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Profile:
    """How one part is trained."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    ema: float = 0.0
    restart: int = 0
    restart_rate: float = 0.5
    warm_up: float = 0.05
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step: warm-up over its share, then a cosine to 0.

        With `restart`, the cosine ends there and begins anew at `restart_rate` of the rate.
        """
        again = 0 < self.restart <= step
        first, last = (self.restart, self.steps) if again else (0, self.restart or self.steps)
        done, whole = step - first, last - first
        warmed = min(1.0, (done + 1) / max(1.0, whole * self.warm_up))
        return (self.restart_rate if again else 1.0) * warmed * 0.5 * (1 + cos(pi * done / whole))


def _save_checkpoint(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    partial = path.with_suffix(".partial")
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, partial, metadata={"step": str(step)})
    partial.replace(path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def _restore(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint into its three owners; returns the step to go on from."""
    described = optimizer.state_dict()
    with safe_open(path, "pt") as stored:
        names = list(stored.keys())
        for name in names:
            owner, rest = name.split(".", 1)
            if owner == "optimizer":
                index, field = rest.split(".")
                described["state"].setdefault(int(index), {})[field] = stored.get_tensor(name)
            elif owner == "average":
                average[rest].copy_(stored.get_tensor(name))
        model.load_state_dict(
            {n.split(".", 1)[1]: stored.get_tensor(n) for n in names if n.startswith("model.")}
        )
        step = int(stored.metadata()["step"])
    optimizer.load_state_dict(described)
    return step


def fit(
    part: str,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    out: Path,
    profile: Profile,
    device: torch.device,
    checkpoint_every: int = 250,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """AdamW unless given another, warm-up and cosine, gradients clipped, optional averaged weights.

    `loss(step)` must draw all its randomness from the step's number. A group of an optimizer's
    parameters learns at its own `scale` times the rate. Returns the model with its averaged
    weights where the profile asks for them.
    """
    checkpoint, log = out / f"{part}.checkpoint.safetensors", out / f"{part}.loss.jsonl"
    optimizer = optimizer or torch.optim.AdamW(
        model.parameters(), profile.learning_rate, (0.9, 0.99), weight_decay=profile.weight_decay
    )
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    average = {n: p.detach().clone() for n, p in model.named_parameters()} if profile.ema else {}
    start = _restore(checkpoint, model, average, optimizer) if checkpoint.exists() else 0
    model.train()
    seconds, running = time.perf_counter(), 0.0
    for step in range(start, profile.steps):
        for group in optimizer.param_groups:
            group["lr"] = group.get("scale", 1.0) * profile.learning_rate * profile.rate(step)
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(learning, profile.clip)
        optimizer.step()
        model.zero_grad()
        if average:
            decay = min(profile.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    average[name].lerp_(parameter, 1 - decay)
        running = value.item() if step == start else 0.98 * running + 0.02 * value.item()
        if (step + 1) % 50 == 0 or step + 1 == profile.steps:
            elapsed = time.perf_counter() - seconds
            entry = {"step": step + 1, "loss": round(running, 5), "seconds": round(elapsed, 1)}
            with log.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
            print(part, entry, flush=True)
        if (step + 1) % checkpoint_every == 0 or step + 1 == profile.steps:
            tensors = {f"model.{n}": t for n, t in model.state_dict().items()}
            tensors |= {f"average.{n}": t for n, t in average.items()}
            _save_checkpoint(checkpoint, tensors | _optimizer_tensors(optimizer), step + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if average:
                parameter.copy_(average[name])
    return model.eval()
