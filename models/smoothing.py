"""Votes from rows of noise: noise, denoise, classify, count, in batches of one fixed shape."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from models.bundle import ADAPTER, PROMPT_STATES, TUNED, Bundle, BundleError
from models.classifiers.base import Classifier
from models.classifiers.registry import classifier_loader
from models.denoisers.base import Denoiser
from models.denoisers.registry import denoiser_loader
from models.noise import discrete_gaussian
from models.purification.purifier import Purifier, Settings
from models.purification.reverse import schedule_of
from models.rows import Numerics, Rows
from models.runtime import (
    AUTO,
    RUNTIMES,
    Runtime,
    Torch,
    automatic,
    computes_bfloat16,
    numerics_of,
)

logger = logging.getLogger("vouchsafe")


class SmoothedModel:
    """A base classifier under noise: x -> argmax classify(denoise(x + noise)), one label per row.

    The networks always compute exactly `numerics.batch_rows` rows, padded where there are fewer. So
    a row's label depends on nothing but its image, noise and sigma. `digest` is the bundle's
    together with the numerics. With `cpu_threads`, that many threads share a device batch, each in
    separate batches and with one torch thread. Without, the caller's thread computes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Classifier,
        numerics: Numerics,
        device: torch.device,
        digest: str = "",
        cpu_threads: int = 0,
    ) -> None:
        self.classifier = classifier
        self.denoiser = denoiser
        self.numerics = numerics
        self.digest = digest
        self.cpu_threads = cpu_threads
        self.batch_rows = numerics.device_rows(cpu_threads)
        self.classes = len(classifier.labels)
        self.device = device
        self._pool = (
            ThreadPoolExecutor(cpu_threads, "rows", torch.set_num_threads, (1,))
            if cpu_threads
            else None
        )

    def padding(self, rows: int) -> int:
        """Rows that the networks compute only to fill their batches when `rows` are requested."""
        return self.numerics.padding(rows)

    def votes(self, parts: Sequence[Rows]) -> NDArray[np.int64]:
        """Votes by class (len(parts), K) of one device batch.

        Raises ValueError for no rows, more than `batch_rows`, or images of different shapes. Raises
        FloatingPointError for logits that are not finite, because argmax would return a label for
        them.
        """
        labels = self.labels(parts)
        cuts = np.cumsum([part.stop - part.start for part in parts])[:-1]
        counted = [np.bincount(own, minlength=self.classes) for own in np.split(labels, cuts)]
        return np.stack(counted).astype(np.int64)

    def labels(self, parts: Sequence[Rows]) -> NDArray[np.int64]:
        """The label index of each row (rows,), parts in order; errors as `votes`.

        Purified parts do not share a batch with others.
        """
        total = sum(part.stop - part.start for part in parts)
        if not 0 < total <= self.batch_rows:
            raise ValueError(f"{total} rows requested; a device batch holds 1 to {self.batch_rows}")
        shapes = {part.pixels.shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"images of different shapes in one batch: {sorted(shapes)}")
        if parts[0].purified:
            return self._purified(parts)
        batches = -(-total // self.numerics.batch_rows)
        share = -(-batches // max(1, self.cpu_threads)) * self.numerics.batch_rows
        run = self._pool.map if self._pool else map
        return np.concatenate(list(run(self._share, _cut(parts, share))))

    def _purified(self, parts: Sequence[Rows]) -> NDArray[np.int64]:
        """One batch of the networks after another, each of one part."""
        schedule, rows = schedule_of(self.denoiser), self.numerics.batch_rows
        t_star = schedule.reached_by(2 * parts[0].sigma)
        purifier = Purifier(self.denoiser, self.classifier, schedule, Settings(t_star))

        def labels(part: Rows) -> NDArray[np.int64]:
            pixels = torch.tensor(part.pixels, device=self.device)
            return purifier.labels(pixels, part.key, part.start, part.stop, rows)

        run = self._pool.map if self._pool else map
        cut = [batch for part in parts for (batch,) in _cut([part], rows)]
        return np.concatenate(list(run(labels, cut)))

    def _share(self, parts: Sequence[Rows]) -> NDArray[np.int64]:
        """One thread's share of a device batch: noise for all of it, then batch after batch."""
        total = sum(part.stop - part.start for part in parts)
        with torch.inference_mode():
            x_hat, sigma = (rows.split(self.numerics.batch_rows) for rows in self.noisy(parts))
            x_0 = (self.denoiser(*batch) for batch in zip(x_hat, sigma, strict=True))
            logits = torch.cat([self.classifier(denoised) for denoised in x_0])
            if not bool(torch.isfinite(logits).all()):
                raise FloatingPointError("the networks' logits are not finite")
            chosen: NDArray[np.int64] = logits.argmax(1)[:total].cpu().numpy()
        return chosen

    def noisy(self, parts: Sequence[Rows]) -> tuple[Tensor, Tensor]:
        """Noisy rows (B,3,H,W) float32, never clipped, and their sigmas (B,) float64, B being the
        next multiple of `numerics.batch_rows`.

        Padding rows are black, without noise, at the first part's sigma.
        """
        shape = parts[0].pixels.shape
        total = sum(part.stop - part.start for part in parts)
        total += self.padding(total)
        x_hat = torch.zeros(total, *shape, device=self.device)
        sigma = torch.full((total,), parts[0].sigma, dtype=torch.float64)
        row = 0
        for part in parts:
            rows = slice(row, row := row + part.stop - part.start)
            noise = discrete_gaussian(
                part.key, part.start, part.stop, shape, part.sigma, self.device
            )
            x_hat[rows] = (noise + torch.tensor(part.pixels, device=self.device)) / 255
            sigma[rows] = part.sigma
        return x_hat, sigma


def _cut(parts: Sequence[Rows], max_rows: int) -> Iterator[list[Rows]]:
    """The parts in order, in lists of `max_rows` rows each except for the last."""
    batch: list[Rows] = []
    room = max_rows
    for part in parts:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            batch.append(replace(part, start=start, stop=stop))
            start, room = stop, room - (stop - start)
            if not room:
                yield batch
                batch, room = [], max_rows
    if batch:
        yield batch


def votes(model: SmoothedModel, rows: Rows) -> NDArray[np.int64]:
    """Votes by class (K,) of any number of rows, batch after batch."""
    total = np.zeros(model.classes, np.int64)
    for start in range(rows.start, rows.stop, model.batch_rows):
        stop = min(start + model.batch_rows, rows.stop)
        total += model.votes([Rows(rows.pixels, rows.key, start, stop, rows.sigma)])[0]
    return total


def best_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes in it, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if computes_bfloat16() else torch.float32


def best_batch_rows(device: torch.device) -> int:
    """16 on a CPU, where nano's activations then stay in its caches, and 64 on a GPU."""
    return 64 if device.type == "cuda" else 16


def named_runtime(name: str) -> Runtime:
    """The runtime of this name; for `auto` the one that suits this machine. Logs the reason.

    Raises RuntimeUnavailable for a named runtime that cannot be imported.
    """
    if name != AUTO:
        return RUNTIMES[name]()
    device = best_device()
    runtime, why = automatic(device, best_dtype(device))
    logger.info("networks run by %s: %s", runtime.name, why)
    return runtime


def tried_runtime(name: str, bundle: Bundle, models_dir: Path | None = None) -> Runtime:
    """As `named_runtime`; for `auto` torch where a batch of the bundle cannot be computed.

    `models_dir` is the folder of fetched networks.
    """
    runtime = named_runtime(name)
    if name != AUTO or isinstance(runtime, Torch):
        return runtime
    try:
        model = load(bundle, runtime=runtime, models_dir=models_dir)
        black = np.zeros((3, bundle.resolution, bundle.resolution), np.uint8)
        model.labels([Rows(black, bytes(32), 0, model.numerics.batch_rows, 0.25)])
    except BundleError:
        raise  # No runtime may run such a bundle.
    except Exception as error:
        return instead_of(runtime, bundle, error)
    return runtime


def instead_of(runtime: Runtime, bundle: Bundle, error: BaseException) -> Runtime:
    """Torch, where the runtime that `auto` chose cannot run the bundle. Logs the reason."""
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    logger.warning(
        "networks run by torch: %s cannot run task %s: %s", runtime.name, bundle.id, reason
    )
    return Torch()


def numerics(
    runtime: Runtime,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_rows: int | None = None,
    cpu_threads: int | None = None,
) -> tuple[Numerics, int]:
    """The numerics and the number of threads that `load` would use here; loads no network."""
    device = device or best_device()
    if cpu_threads is None:
        cpu_threads = torch.get_num_threads() if device.type == "cpu" else 0
    chosen = numerics_of(
        device,
        dtype or best_dtype(device),
        batch_rows or best_batch_rows(device),
        runtime.name,
        threads=1 if cpu_threads else None,
    )
    return chosen, cpu_threads


def load(
    bundle: Bundle,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_rows: int | None = None,
    cpu_threads: int | None = None,
    runtime: Runtime | None = None,
    models_dir: Path | None = None,
) -> SmoothedModel:
    """A task's networks, ready for `votes`, run by eager torch or another runtime.

    `batch_rows` is the networks' batch size. On a CPU `cpu_threads` threads share the work, by
    default as many as torch has; a GPU has none. Files are loaded from the bytes that were hashed.
    One thread computes what loading needs, such as text prototypes. `models_dir` is the folder of
    fetched networks.

    Raises RuntimeUnavailable for a runtime that cannot compute in `dtype` on the device. Raises
    BundleError where a base network is missing or not the one that the bundle was made with.
    """
    device = device or best_device()
    dtype = dtype or best_dtype(device)
    runtime = runtime or Torch()
    chosen, cpu_threads = numerics(
        runtime, device=device, dtype=dtype, batch_rows=batch_rows, cpu_threads=cpu_threads
    )
    weights = runtime.weights_dtype(device, dtype)
    with _one_thread(), bundle.opened() as own, ExitStack() as bases:
        states = load_file(own / PROMPT_STATES)["states"] if PROMPT_STATES in bundle.files else None
        denoiser = denoiser_loader(bundle.denoiser.kind)(
            bases.enter_context(bundle.denoiser.opened(models_dir)),
            states,
            bundle.k,
            device,
            weights,
            runtime,
            own / ADAPTER if ADAPTER in bundle.files else None,
        )
        classifier = classifier_loader(bundle.classifier.kind)(
            bases.enter_context(bundle.classifier.opened(models_dir)),
            bundle.words,
            bundle.template,
            device,
            weights,
            runtime,
            own / TUNED if TUNED in bundle.files else None,
        )
    chosen = bundle.numerics(chosen)
    digest = bundle.served_digest(chosen.described())
    return SmoothedModel(denoiser, classifier, chosen, device, digest, cpu_threads)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread during loading, so that the results are the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
