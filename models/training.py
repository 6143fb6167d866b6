"""The training loop of nano's parts and the adaptation: seeded, logged, resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.files import written_whole


class Diverged(FloatingPointError):
    """A loss that is not a finite number; the message names the part and the step."""


@dataclass(frozen=True)
class Profile:
    """The training settings of one part."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    ema: float = 0.0
    restart: int = 0
    restart_rate: float = 0.5
    warm_up: float = 0.05
    clip: float = 1.0
    log_every: int = 50
    checkpoint_every: int = 250

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step: warm-up over its share, then a cosine to 0.

        With `restart`, the cosine ends there and starts again at `restart_rate` of the rate.
        """
        again = 0 < self.restart <= step
        first, last = (self.restart, self.steps) if again else (0, self.restart or self.steps)
        done, whole = step - first, last - first
        warmed = min(1.0, (done + 1) / max(1.0, whole * self.warm_up))
        return (self.restart_rate if again else 1.0) * warmed * 0.5 * (1 + cos(pi * done / whole))


Losses = Callable[[int], Iterable[Tensor]]
"""The parts of a step's loss, yielded one at a time so that each is released before the next.

All their randomness is drawn from the step's number. None is yielded from within a context.
"""


OnStep = Callable[[int, int, float], None]
"""Called after every step, before its checkpoint: steps done, all steps, the loss."""


def unheard(done: int, whole: int, loss: float) -> None:
    """Ignore the step."""


def fit(
    part: str,
    model: nn.Module,
    losses: Losses,
    out: Path,
    profile: Profile,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: OnStep = unheard,
) -> nn.Module:
    """The trained model, with its averaged weights where the profile requests them.

    Trains by AdamW unless another optimizer is given, with warm-up and cosine and clipped
    gradients. Only parameters that require a gradient are trained. They and the buffers are
    checkpointed to `PART.checkpoint.safetensors` in `out`, and another call resumes from there.
    `PART.loss.jsonl` gets the mean loss of every `log_every` steps. A group of an optimizer's
    parameters is trained at its own `scale` times the rate.

    Raises Diverged for a loss that is not finite.
    """
    checkpoint, log = out / f"{part}.checkpoint.safetensors", out / f"{part}.loss.jsonl"
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer or torch.optim.AdamW(
        learning.values(), profile.learning_rate, (0.9, 0.99), weight_decay=profile.weight_decay
    )
    average = {n: p.detach().clone() for n, p in learning.items()} if profile.ema else {}
    start = _restore(checkpoint, model, average, optimizer) if checkpoint.exists() else 0
    forget_after(log, start)
    model.train()
    began = time.perf_counter()
    recent: list[float] = []
    for step in range(start, profile.steps):
        for group in optimizer.param_groups:
            group["lr"] = group.get("scale", 1.0) * profile.learning_rate * profile.rate(step)
        recent.append(loss := _backward(losses(step), device))
        if not math.isfinite(loss):
            raise Diverged(f"{part}: the loss of step {step + 1} is {loss}")
        nn.utils.clip_grad_norm_(
            [p for group in optimizer.param_groups for p in group["params"]], profile.clip
        )
        optimizer.step()
        model.zero_grad()
        _follow(average, learning, min(profile.ema, (1 + step) / (10 + step)))
        done = step + 1
        if done % profile.log_every == 0 or done == profile.steps:
            _log(log, done, sum(recent) / len(recent), time.perf_counter() - began)
            recent.clear()
        on_step(done, profile.steps, loss)
        if done % profile.checkpoint_every == 0 or done == profile.steps:
            _save(checkpoint, model, average, optimizer, done)
    with torch.no_grad():
        for name, parameter in learning.items():
            if average:
                parameter.copy_(average[name])
    return model.eval()


def disagreement(logits: Tensor) -> Tensor:
    """How far the draws of each row name it differently (B,): the mean divergence from their
    average softmax to each one's (Jeong & Shin, arXiv 2006.04062).

    `logits` (D,B,K) are those of D draws of noise.
    """
    named = logits.log_softmax(-1)
    average = named.exp().mean(0)
    return F.kl_div(named, average.expand_as(named), reduction="none").sum(-1).mean(0)


def _backward(parts: Iterable[Tensor], device: torch.device) -> float:
    """Compute the gradients of a step's parts, in bfloat16 where torch's autocast does; returns the
    loss.
    """
    total, waiting = 0.0, iter(parts)
    while True:
        with torch.autocast(device.type, torch.bfloat16):
            part = next(waiting, None)
        if part is None:
            return total
        part.backward()
        total += part.item()


@torch.no_grad()
def _follow(average: dict[str, Tensor], learning: dict[str, nn.Parameter], decay: float) -> None:
    for name, tensor in average.items():
        tensor.lerp_(learning[name], 1 - decay)


def _log(log: Path, step: int, loss: float, seconds: float) -> None:
    entry = {"step": step, "loss": round(loss, 5), "seconds": round(seconds, 1)}
    with log.open("a") as stream:
        stream.write(json.dumps(entry) + "\n")
    print(log.name.partition(".")[0], entry, flush=True)


def forget_after(log: Path, step: int) -> None:
    """Remove the log entries after `step`, whose steps will be repeated, and a truncated line."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
        entries = [line for line in lines if json.loads(line)["step"] <= step]
        with written_whole(log) as partial:
            partial.write_text("".join(line + "\n" for line in entries))


def _save(
    path: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    tensors = {f"model.{n}": t for n, t in model.state_dict().items() if n not in frozen}
    tensors |= {f"average.{n}": t for n, t in average.items()}
    tensors |= {
        f"optimizer.{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with written_whole(path) as partial:
        save_file(whole, partial, metadata={"step": str(step)})


def _restore(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint into model, average and optimizer; returns the step to resume from."""
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
        learned = {n.split(".", 1)[1]: stored.get_tensor(n) for n in names if n[:6] == "model."}
        unknown = model.load_state_dict(learned, strict=False).unexpected_keys
        if unknown:
            raise KeyError(f"{path}: tensors that this model lacks: {', '.join(unknown)}")
        step = int(stored.metadata()["step"])
    optimizer.load_state_dict(described)
    return step
