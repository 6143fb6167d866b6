"""Inventory of fetched networks on the disk, read from headers, not weights."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from models.kinds import PICKLES, SAFETENSORS
from models.zoo.sources import SOURCES, Network, fetch_command, origin

MOST_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file in the format's definition."""
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of the names of batch normalization's buffers."""


class Unreadable(ValueError):
    """A file of weights that cannot be used; the message has its path and the reason."""


@dataclass(frozen=True, slots=True)
class Holding:
    """The contents of one network's folder.

    Bytes by file, the weights' variant, parameters by dtype, and the problems found.
    """

    name: str
    files: Mapping[str, int]
    variant: str | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    troubles: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(self.parameters.values())


@dataclass(frozen=True, slots=True)
class Inventory:
    """A fetched folder: its networks, its origin if known, and the problems found."""

    name: str
    folder: Path
    origin: str | None
    holdings: tuple[Holding, ...]
    troubles: tuple[str, ...]
    is_absent: bool = False


def inspect(name: str, models_dir: Path) -> Inventory:
    """The inventory of a source's folder; unreadable files are among its troubles."""
    folder = models_dir / name
    try:
        return _inspected(name, folder)
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
        return Inventory(name, folder, None, (), (reason,))


def _inspected(name: str, folder: Path) -> Inventory:
    source = SOURCES[name]
    if not folder.is_dir():
        return Inventory(name, folder, None, (), (f"{folder} is not there",), is_absent=True)
    links = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink())
    if links:
        reason = f"{folder}: holds links, which are never followed: {', '.join(links)}"
        return Inventory(name, folder, origin(folder), (), (f"{reason}; copy their targets",))
    holdings = tuple(hold(folder / each.folder, each, name) for each in source.networks)
    troubles = [
        f"{folder / pattern} is missing"
        for pattern in source.others
        if not next(folder.glob(pattern), None)
    ]
    for holding in holdings:
        troubles += holding.troubles
    left = sorted(path.name for path in folder.rglob("*.incomplete"))
    if left:
        troubles.append(f"{folder}: a download was cut short: {', '.join(left)}")
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES)
    if pickles:
        troubles.append(f"{folder}: holds pickled files; remove {', '.join(pickles)}")
    return Inventory(name, folder, origin(folder), holdings, tuple(troubles))


def trouble(names: Sequence[str], models_dir: Path | None) -> str | None:
    """The first problem of fetched folders and its remedy, or None where all can be used."""
    for name in names:
        command = fetch_command(name)
        if models_dir is None:
            return f"{name} is fetched, and no models directory was given"
        found = inspect(name, models_dir)
        if found.is_absent:
            return f"{found.troubles[0]}; `{command}` fetches it"
        if found.troubles:
            more = f" and {len(found.troubles) - 1} more" if len(found.troubles) > 1 else ""
            advice = f"`{command}` goes on where it stopped, `vouchsafe models check` lists all"
            return f"{found.troubles[0]}{more}; {advice}"
    return None


def hold(folder: Path, network: Network, name: str = "") -> Holding:
    """The contents of one network's folder."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    variant, weights = network.chosen(names)
    wanted = [each for each in (network.config, *weights) if each in names]
    files = {each: (folder / each).stat().st_size for each in wanted}
    troubles = [] if network.config in names else [f"{folder / network.config} is missing"]
    indices = [each for each in weights if each.endswith(".json")]
    shards = [each for each in weights if each.endswith(SAFETENSORS)]
    if not shards and not indices:
        troubles.append(f"{folder}: holds no {network.weights}{SAFETENSORS}")
    troubles += _shard_troubles(folder, indices, shards)
    parameters: Counter[str] = Counter()
    for shard in shards:
        try:
            parameters.update(parameters_of(folder / shard))
        except Unreadable as error:
            troubles.append(str(error))
    label = f"{name}/{network.folder}".strip("/")
    return Holding(label, files, variant, dict(parameters), tuple(troubles))


def _shard_troubles(folder: Path, indices: Sequence[str], shards: Sequence[str]) -> list[str]:
    """Problems with shards: some that an index names are missing, or they have no index."""
    if not indices:
        loose = [shard for shard in shards if "-of-" in shard]
        return [f"{folder}: the index of {loose[0]} is missing"] if loose else []
    try:
        indexed = set(json.loads((folder / indices[0]).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{folder / indices[0]}: cannot be read as an index"]
    return [f"{folder / str(shard)} is missing" for shard in sorted(indexed - set(shards), key=str)]


def parameters_of(path: Path) -> Mapping[str, int]:
    """Parameters in a safetensors file by dtype, without batch normalization's statistics.

    Raises Unreadable for an invalid header, and for a file size that differs from the header's.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MOST_HEADER_BYTES:
                raise ValueError("its header is too long")
            described: dict[str, Any] = json.loads(stream.read(length))
        described.pop("__metadata__", None)
        ends = [int(each["data_offsets"][1]) for each in described.values()]
        stated = 8 + length + max(ends, default=0)
        counted: Counter[str] = Counter()
        for name, each in described.items():
            if name.rpartition(".")[2] not in _STATISTICS:
                counted[str(each["dtype"])] += prod(each["shape"])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Unreadable(f"{path}: is not a complete safetensors file ({error})") from error
    if size != stated:
        raise Unreadable(f"{path}: has {size} bytes; its header states {stated}")
    return counted
