"""The command `evaluate`: measures tasks on labeled images."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from models.bundle import BundleError
from service.cli.console import errors, read_settings, tell
from service.cli.predict import Alpha, SelectionRows

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


class Rule(StrEnum):
    """The rules for radii from a fixed number of rows."""

    TWO_SIDED = "two-sided"
    COHEN = "cohen"


class Baseline(StrEnum):
    """The first task's classifier without noise, under noise without a denoiser, and behind
    purification, which certifies nothing.
    """

    UNDEFENDED = "undefended"
    NONE = "none"
    PURIFIED = "purified"


class AttackName(StrEnum):
    """The attacks of `models.evaluation.attacks.registry`."""

    PGD = "pgd"
    EOT = "eot"
    PGD_LINF = "pgd-linf"
    EOT_LINF = "eot-linf"
    TRANSFER = "transfer"
    RANDOM = "random"
    AUTOATTACK = "autoattack"
    FOOLBOX_PGD = "foolbox-pgd"


def evaluate(
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task's id or name; repeat to compare.", show_default="default"),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="A folder with a sub-folder of pictures for each label, or a CSV of paths and "
            "labels.",
            show_default="500 test images of CIFAR-10",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A data set of the paper's evaluation, by its name in docs/datasets.md."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="The folder with the data set's files, with --dataset.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; the same command resumes in it.")
    ] = Path("evaluation"),
    sigma: Annotated[
        list[float] | None,
        typer.Option(help="Noise strength, pixels in [0,1]; repeatable.", show_default="0.25"),
    ] = None,
    alpha: Alpha = 0.001,
    n0: SelectionRows = 100,
    n: Annotated[int, typer.Option("--n", help="Noise rows that bound its probability.")] = 1000,
    method: Annotated[
        Rule, typer.Option(help="The rule of the radii; both rules are in results.json.")
    ] = Rule.TWO_SIDED,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only LIMIT of the images, evenly spread.")
    ] = None,
    baseline: Annotated[
        list[Baseline] | None,
        typer.Option(
            help="Also the first task's classifier without a denoiser, without noise too, or "
            "behind purification; repeatable."
        ),
    ] = None,
    only_baselines: Annotated[
        bool, typer.Option("--only-baselines", help="Leave the tasks themselves out.")
    ] = False,
    server: Annotated[
        str | None, typer.Option(help="URL of a running service, whose workers compute.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with the server's API key.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Images in the server at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the noise; not of a server's.")] = 0,
    k: Annotated[float | None, typer.Option(help="Another timestep correction factor.")] = None,
    cifar10: Annotated[
        Path | None, typer.Option(help="Take the held-back training images of this folder.")
    ] = None,
    attack: Annotated[
        list[AttackName] | None,
        typer.Option(help="Also attack every run; repeatable. See docs/attacks.md."),
    ] = None,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            help="Largest change of an attack, l2 unless it is one of l_inf, pixels in [0,1]; "
            "repeatable.",
            show_default="0.25, 0.5, 1",
        ),
    ] = None,
    attack_steps: Annotated[int, typer.Option(min=1, help="Steps of an attack.")] = 100,
    attack_rows: Annotated[
        int, typer.Option(min=1, help="Noise rows behind an attack's gradient.")
    ] = 32,
    attack_batch: Annotated[
        int, typer.Option(min=1, help="Of these, rows that are in memory together.")
    ] = 8,
    attack_n: Annotated[
        int, typer.Option(help="Noise rows of the answers at clean and attacked images.")
    ] = 100,
    draws: Annotated[int, typer.Option(min=1, help="Purifications of an image.")] = 4,
    t_star: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Timestep up to which purification adds noise.",
            show_default="as noisy as 70 of 1,000 on CIFAR-10",
        ),
    ] = None,
    auxiliary: Annotated[
        Path | None, typer.Option(help="Folder of an auxiliary network that guides purification.")
    ] = None,
    guidance: Annotated[
        float, typer.Option(min=0, help="Strength of its guidance, with --auxiliary.")
    ] = 1.0,
    constraint: Annotated[
        float, typer.Option(help="Largest norm of its gradient, in norms of the score.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json, no table.")] = False,
) -> None:
    """Measure tasks on labeled images: clean, certified and robust accuracy, ACR, a curve.

    Exits with 2 for a field or file that cannot be used, and with 1 if the server fails.
    """
    from service.cli.evaluation.attacks import EPSILONS, AttackPlan
    from service.cli.evaluation.report import tables
    from service.cli.evaluation.runs import Plan, evaluated
    from service.cli.evaluation.tasks import Purification, Question
    from service.client import VouchsafeError

    if eps and not attack:
        tell(f"eps = {eps[0]}: is an attack's; add --attack {AttackName.PGD}")
        raise typer.Exit(2)
    attacks = AttackPlan(
        [each.value for each in dict.fromkeys(attack or [])],
        sorted({*(eps or EPSILONS)}),
        attack_steps,
        attack_rows,
        attack_batch,
        attack_n,
    )
    plan = Plan(
        task or ["default"],
        sigma or [0.25],
        Question(n0, n, alpha, method.value, seed),
        out,
        images=images,
        dataset=dataset,
        root=root,
        cifar10=cifar10,
        limit=limit,
        baselines=[each.value for each in baseline or []],
        only_baselines=only_baselines,
        k=k,
        server=server,
        key_file=key_file,
        at_once=at_once,
        attacks=attacks if attack else None,
        purification=Purification(
            t_star, draws, guidance if auxiliary else 0.0, constraint, auxiliary
        ),
    )
    try:
        document = evaluated(plan, read_settings())
    except KeyboardInterrupt:
        errors.print(f"Stopped. {out} keeps every image so far: the same command goes on.")
        raise typer.Exit(INTERRUPTED) from None
    except VouchsafeError as error:
        tell(f"{error}; {out} keeps every image so far: the same command goes on")
        raise typer.Exit(1) from error
    except (ValueError, BundleError) as error:
        tell(error)
        raise typer.Exit(2) from error
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for table in tables(document):
        Console().print(table)
