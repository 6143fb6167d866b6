"""The command `models add`: makes a task of networks of one's own."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.cli.adapt import read_labels
from service.cli.console import errors, read_settings

if TYPE_CHECKING:
    from models.bundle import Bundle
    from models.runtime import Runtime
    from models.smoothing import SmoothedModel

_SIGMA = 0.25
"""Noise of the batch that is tried, where the task supports it."""
LONGEST_REASON = 300
"""Most characters of a library's own error."""


def add(
    name: Annotated[str, typer.Argument(help="The task's id, for `task` in requests.")],
    classifier: Annotated[
        str,
        typer.Option(help="KIND:PATH; a kind of onnx, open-clip, timm, transformers or a package."),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(help="A text file, one label a line; the classifier's own unless given."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="A sentence with {} where a label goes.")
    ] = None,
    denoiser: Annotated[
        str,
        typer.Option(
            help="A set's name; KIND:PATH with a kind of super-resolution, unconditional, ffdnet "
            "or a package; or none, which is plain smoothing."
        ),
    ] = "none",
    resolution: Annotated[
        int | None,
        typer.Option(help="Side of certified images in pixels; the networks' own unless given."),
    ] = None,
    largest_sigma: Annotated[
        float | None, typer.Option(help="Strongest noise that requests may have.")
    ] = None,
    k: Annotated[
        float | None, typer.Option(help="Timestep correction of a super-resolution denoiser.")
    ] = None,
) -> None:
    """Make a task of networks of your own: check, copy and try them; a running server serves it."""
    try:
        from models.runtime import RuntimeUnavailable
        from models.smoothing import best_device, named_runtime
        from models.zoo.adding import Wanted, adding
    except ModuleNotFoundError as error:
        errors.print(f"vouchsafe: add needs {error.name}: run it where a worker is installed")
        raise typer.Exit(2) from error
    settings = read_settings()
    tasks, models_dir = settings.tasks_folder, settings.models_folder
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted = Wanted(
        name=name,
        classifier=classifier,
        labels=None if labels is None else read_labels(labels),
        template=template,
        denoiser=denoiser,
        resolution=resolution,
        largest_sigma=largest_sigma,
        k=k,
    )
    try:
        runtime = named_runtime(settings.runtime)
        with adding(wanted, tasks, models_dir, best_device()) as addition:
            _try(addition.bundle, runtime, models_dir)
            bundle = addition.publish(tasks)
    except (ValueError, MemoryError, RuntimeUnavailable) as error:
        errors.print(f"vouchsafe: {error}", style="red")
        raise typer.Exit(2) from error
    print(f"task {bundle.id}: {len(bundle.labels)} labels, in {bundle.folder}")
    print(f"use it: vouchsafe predict --task {bundle.id} IMAGE")


def _try(bundle: Bundle, runtime: Runtime, models_dir: Path) -> None:
    """Load the task as a worker does, compute one noisy batch, and print what it took.

    Raises ValueError with the reason where that fails: what networks do wrong has no common class.
    """
    from models.memory import ran_out
    from models.smoothing import best_batch_rows, best_device, numerics
    from service.processes.runtime import load_and_warm
    from service.worker.compute import DeviceFailed

    try:
        model = load_and_warm(
            bundle,
            best_batch_rows(best_device()),
            runtime=runtime,
            cpu_threads=numerics(runtime)[1],
            models_dir=models_dir,
        )
        rows_a_second = _rows_a_second(bundle, model)
    except DeviceFailed as error:
        raise ValueError(
            "the same rows got different labels beside other rows: the rows of a network must not "
            "affect one another"
        ) from error
    except Exception as error:
        if isinstance(error, ValueError) or ran_out(error):
            raise
        reason = shorten(f"{type(error).__name__}: {error}", LONGEST_REASON, placeholder=" ...")
        raise ValueError(
            f"the networks cannot be loaded and computed by {runtime.name}: {reason}"
        ) from error
    if bundle.largest_sigma > model.denoiser.largest_sigma:
        raise ValueError(
            f"--largest-sigma is {bundle.largest_sigma}; the denoiser's is "
            f"{model.denoiser.largest_sigma:.4g}"
        )
    _report(bundle, model, rows_a_second)


def _rows_a_second(bundle: Bundle, model: SmoothedModel) -> float:
    from dataclasses import replace

    from service.worker.model import warm_up

    rows = model.numerics.batch_rows * max(1, model.cpu_threads)
    batch = replace(warm_up(bundle.resolution, rows, 1)[0], sigma=min(_SIGMA, bundle.largest_sigma))
    started = time.perf_counter()
    model.labels([batch])
    return rows / (time.perf_counter() - started)


def _report(bundle: Bundle, model: SmoothedModel, rows_a_second: float) -> None:
    import torch

    from models.zoo.copying import parameters

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    table = Table(show_header=False)
    table.add_row("resolution", f"{bundle.resolution} x {bundle.resolution} pixels")
    for field, base in (("denoiser", bundle.denoiser), ("classifier", bundle.classifier)):
        count = parameters(base)
        table.add_row(field, base.kind + (f", {count:,} parameters" if count else ""))
    table.add_row("largest sigma", f"{bundle.largest_sigma:.4g}")
    table.add_row("rows a second", f"{rows_a_second:.1f}")
    table.add_row("memory", f"{peak / 2**30:.2f} GiB of this process at most")
    if torch.cuda.is_available():
        table.add_row("device memory", f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB")
    table.add_row("computed by", f"{model.numerics.runtime} in {model.numerics.dtype}")
    Console().print(table)
