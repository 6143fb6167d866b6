"""The tasks of this machine, by id or name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.bundle import DEFAULT_TASK, Bundle, read_bundle
from service.config import Settings

if TYPE_CHECKING:
    from service.tasks.catalog import Catalog


def local_bundles(settings: Settings, names: Sequence[str]) -> list[Bundle]:
    """The bundle of each task; raises ValueError for an unknown or ambiguous name."""
    from service.tasks.catalog import Catalog

    catalog = Catalog(
        {"default": read_bundle(DEFAULT_TASK)}, settings.tasks_folder, settings.models_folder
    )
    asyncio.run(catalog.refresh())
    return [_named(catalog, name) for name in names]


def _named(catalog: Catalog, name: str) -> Bundle:
    if name in catalog:
        return catalog[name]
    if name in catalog.refused:
        raise ValueError(f"task {name}: {catalog.refused[name].reason}")
    found = [bundle for bundle in catalog.values() if bundle.name == name]
    if len(found) != 1:
        known = ", ".join(bundle.name or task for task, bundle in catalog.items())
        raise ValueError(f"there are {len(found)} tasks {name!r}; the tasks are {known}")
    return found[0]
