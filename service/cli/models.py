"""The command `models`: adds, lists, shows, verifies, removes tasks; fetches, checks networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from models.bundle import DEFAULT_TASK, BundleError, read_bundle
from models.memory import needs
from models.zoo.inventory import Holding, Inventory, inspect
from models.zoo.own import folder_of
from models.zoo.sources import FETCHABLE, SOURCES
from service.cli.adapt import open_store
from service.cli.add import add
from service.cli.console import errors, example, read_settings
from service.errors import Problem

if TYPE_CHECKING:
    from service.tasks.store import Store
    from service.tasks.task import Task

_ADD = "models add mine --classifier timm:classifier --denoiser ffdnet:ffdnet"

models = typer.Typer(help="The tasks and networks on this machine.", no_args_is_help=True)

TaskId = Annotated[str, typer.Argument(help="A task's id; `default` is the built-in one's.")]
models.command(epilog=example(_ADD))(add)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def _all(store: Store) -> list[Task]:
    """Every task, the built-in one first."""
    from models.adaptation.plan import Status
    from service.tasks.task import Task

    bundle = read_bundle(DEFAULT_TASK)
    default = Task(
        id="default",
        name=bundle.name,
        owner=None,
        created=(DEFAULT_TASK / "manifest.json").stat().st_mtime,
        labels=bundle.labels,
        template=bundle.template,
        settings={},
        status=Status("ready", progress=1.0, figures=bundle.figures),
    )
    return [default, *store.all()]


def _found(store: Store, task_id: str) -> Task:
    """The task with this id; exits with 1 for an unknown id."""
    for task in _all(store):
        if task.id == task_id:
            return task
    errors.print(f"vouchsafe: there is no task {task_id}", style="red")
    raise typer.Exit(1)


def _document(task: Task, used: int) -> dict[str, Any]:
    status = task.status
    return {
        "id": task.id,
        "name": task.name,
        "state": status.state,
        "stage": status.stage,
        "progress": status.progress,
        "eta_seconds": status.eta_seconds,
        "problem": status.problem,
        "labels": list(task.labels),
        "prompts": dict(task.prompts),
        "template": task.template,
        "settings": dict(task.settings),
        "figures": dict(status.figures),
        "created": task.created,
        "started": status.started,
        "finished": status.finished,
        "bytes": used,
    }


@models.command("list", epilog=example("models list --json"))
def list_tasks(as_json: AsJson = False) -> None:
    """List every task, ready or not."""
    store = open_store(read_settings())
    used = store.usage()
    documents = [_document(task, used.get(task.id, 0)) for task in _all(store)]
    if as_json:
        print(json.dumps(documents, indent=2))
        return
    table = Table(Column("id", min_width=32), "name", "state", "labels", "MiB")
    for task in documents:
        state = task["state"] + (f" {task['progress']:.0%}" if task["state"] == "running" else "")
        size = f"{task['bytes'] / 2**20:.1f}" if task["bytes"] else ""
        table.add_row(task["id"], escape(task["name"]), state, str(len(task["labels"])), size)
    Console().print(table)


@models.command(epilog=example("models show pets"))
def show(task_id: TaskId, as_json: AsJson = False) -> None:
    """Show one task with all its fields."""
    store = open_store(read_settings())
    document = _document(_found(store, task_id), store.usage().get(task_id, 0))
    if as_json:
        print(json.dumps(document, indent=2))
        return
    table = Table(show_header=False)
    for field, value in document.items():
        plain = value if isinstance(value, str) else json.dumps(value)
        table.add_row(field, escape(plain))
    Console().print(table)
    if document["state"] == "ready":
        print(f"measure it: vouchsafe evaluate --task {task_id} --images FOLDER")


@models.command(epilog=example("models verify default"))
def verify(
    task_id: Annotated[str | None, typer.Argument(help="One task's id; all unless given.")] = None,
) -> None:
    """Check the hashes of a task's bundle and of its base networks; exits with 1 if one differs."""
    store = open_store(read_settings())
    tasks = [_found(store, task_id)] if task_id else _all(store)
    wrong = 0
    for task in tasks:
        if task.status.state != "ready":
            print(f"{task.id}: {task.status.state}, nothing to verify")
            continue
        try:
            folder = DEFAULT_TASK if task.id == "default" else store.tasks / task.id
            _verify(folder, task.id, store.models)
            print(f"{task.id}: as its manifest states")
        except BundleError as error:
            wrong += 1
            errors.print(f"{task.id}: {error}", style="red")
    if wrong:
        raise typer.Exit(1)


def _verify(folder: Path, task_id: str, models_dir: Path) -> None:
    bundle = read_bundle(folder)
    if bundle.id != task_id:
        raise BundleError(f"{folder}: the manifest has the id {bundle.id!r}")
    for network in (bundle.denoiser, bundle.classifier):
        network.verified(models_dir)


@models.command(epilog=example("models remove pets"))
def remove(task_id: TaskId) -> None:
    """Remove a task, end its job, and remove the networks that `add` registered under its id."""
    store = open_store(read_settings())
    own = _registered(store, task_id)
    if own is not None and (users := _built_on(store, own)):
        reason = f"the networks of {task_id} are those of {', '.join(users)}; remove these first"
        errors.print(f"vouchsafe: {reason}", style="red")
        raise typer.Exit(1)
    try:
        store.delete(task_id)
    except Problem as problem:
        if own is None:
            detail = "the default task ships with the project" if task_id == "default" else problem
            errors.print(f"vouchsafe: {detail}", style="red")
            raise typer.Exit(1) from problem
    if own is not None:
        shutil.rmtree(own)
    print(f"{task_id}: removed")


def _registered(store: Store, name: str) -> Path | None:
    """The folder of the networks registered under a name, or None."""
    try:
        folder = folder_of(store.models, name)
    except ValueError:
        return None
    return folder if folder.is_dir() else None


def _built_on(store: Store, own: Path) -> list[str]:
    """The ids of other tasks whose networks lie in a folder, those being adapted included."""
    users = []
    for task in store.all():
        manifest = store.tasks / task.id / "manifest.json"
        chosen = task.settings.get("denoiser"), task.settings.get("classifier")
        is_planned = task.status.state in ("queued", "running") and own.name in chosen
        is_built = manifest.is_file() and f"{own}/" in manifest.read_text()
        if task.id != own.name and (is_planned or is_built):
            users.append(task.id)
    return users


@models.command(epilog=example("models fetch if-ii-l"))
def fetch(
    name: Annotated[str, typer.Argument(help=f"What to fetch: {', '.join(FETCHABLE)}.")],
    revision: Annotated[
        list[str] | None,
        typer.Option(help="FOLDER=REVISION to override a folder's default; may be repeated."),
    ] = None,
) -> None:
    """Fetch networks from the hub; resumes partial files, and checks those that are there."""
    if name not in FETCHABLE:
        _fail(f"there is nothing called {name!r} to fetch; there is {', '.join(FETCHABLE)}")
    revisions = {}
    for each in revision or ():
        folder, _, commit = each.partition("=")
        if folder not in FETCHABLE[name] or not commit:
            wanted = f"FOLDER=REVISION with a folder of {', '.join(FETCHABLE[name])}"
            _fail(f"--revision is {each!r}; it must be {wanted}")
        revisions[folder] = commit
    from models.zoo.hub import FetchError, fetch

    models_dir = read_settings().models_folder
    for folder in FETCHABLE[name]:
        print(f"{folder}: from {SOURCES[folder].repository}; {SOURCES[folder].licence}")
        try:
            found = fetch(folder, models_dir, revisions.get(folder))
        except FetchError as error:
            errors.print(f"vouchsafe: {error}", style="red")
            raise typer.Exit(1) from error
        print(f"{folder}: is {found.origin}, in {found.folder}")
    raise typer.Exit(_report(models_dir, FETCHABLE[name]))


@models.command(epilog=example("models check"))
def check(
    path: Annotated[
        Path | None, typer.Argument(help="The models directory; VOUCHSAFE_MODELS_DIR unless given.")
    ] = None,
    hashes: Annotated[
        bool, typer.Option("--hashes", help="Also read every byte of what was fetched.")
    ] = False,
) -> None:
    """Report the fetched networks; exits with 1 if one cannot be used."""
    models_dir = (path or read_settings().models_folder).resolve()
    wrong = _report(models_dir, tuple(SOURCES))
    if hashes:
        from models.zoo.hub import changed_files

        for folder in SOURCES:
            if inspect(folder, models_dir).origin is None:
                print(f"{folder}: was not fetched here, so its hashes are not known")
                continue
            for name in changed_files(models_dir / folder):
                errors.print(f"{models_dir / folder / name}: is not what was fetched", style="red")
                wrong = 1
    raise typer.Exit(wrong)


def _fail(reason: str) -> NoReturn:
    errors.print(f"vouchsafe: {reason}", style="red")
    raise typer.Exit(2)


def _report(models_dir: Path, folders: tuple[str, ...]) -> int:
    """Print the networks of the folders; returns 1 if one cannot be used, else 0."""
    found = [inspect(folder, models_dir) for folder in folders]
    table = Table("network", "files", "GB", "weights", "parameters")
    for inventory in found:
        for holding in inventory.holdings:
            table.add_row(*_row(holding))
    Console().print(table)
    for inventory in found:
        source = SOURCES[inventory.name]
        came = inventory.origin or f"put there by hand, instead of {source.repository}"
        print(f"{inventory.name}: {'absent' if inventory.is_absent else came}")
        print(f"  licence: {source.licence}")
    for purpose, size in _needs(found).items():
        print(f"{purpose}: {size / 2**30:.2f} GiB of weights (computed; activations come on top)")
    problems = [problem for inventory in found for problem in inventory.troubles]
    for problem in problems:
        errors.print(problem, style="red")
    return int(bool(problems))


def _row(holding: Holding) -> tuple[str, ...]:
    types = ", ".join(f"{dtype} {n:,}" for dtype, n in sorted(holding.parameters.items()))
    weights = f"{holding.variant or 'no variant'}: {types}"
    size = f"{sum(holding.files.values()) / 1e9:.3f}"
    return holding.name, str(len(holding.files)), size, weights, f"{holding.size:,}"


def _needs(found: list[Inventory]) -> dict[str, int]:
    sizes = {holding.name: holding.size for each in found for holding in each.holdings}
    parts = ("if-ii-l/stage1/text_encoder", "if-ii-l/stage1/unet", "if-ii-l/stage2/unet")
    wanted = [sizes.get(part, 0) for part in (*parts, "clip-vit-b-32")]
    return needs(*wanted) if all(wanted) else {}
