"""The compiled pipeline on this machine: every task a process of its own, one after another."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kfp import local
from kfp.dsl.base_component import BaseComponent
from rich.console import Console

import core
from core.errors import AdaptPrunerError, SettingsError, StorageError, refuse
from core.evaluation.task_data import unknown_tasks
from core.runs.record import RunRecord
from core.runs.run import Run
from core.scratch import scratch_folder
from core.settings.schema import Settings
from core.storage.layout import CARD, HTML, RECORD
from core.storage.owner import LOCAL
from core.storage.publication import open_publication
from core.storage.store import open_store
from core.tracking.client import absolute_uri
from pipelines.adapt_accel import build_pipeline
from pipelines.local.folders import check_folders, holding_folder
from pipelines.local.progress import RunProgress


class RunError(AdaptPrunerError):
    """A task of a local run has failed."""


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """A run that has ended well.

    Attributes:
        store: URI of the store.
        key: The run key.
        record: What it has measured.
        seconds: How long it took.
        was_done: Whether an earlier run had done everything.
        found_done: Steps that an earlier run had done.
    """

    store: str
    key: str
    record: RunRecord
    seconds: float
    was_done: bool
    found_done: int


def run_local(settings: Settings, output: Path, console: Console) -> LocalRun:
    """Run the pipeline on this machine, and fetch its results.

    Args:
        settings: The run's settings; relative paths start at the current directory.
        output: Folder for the results, kfp's own files (removed after success) and ``run.log``.
        console: Where progress is shown.

    Raises:
        SettingsError: If the output folder or the store cannot be written, or lm-eval does not have a task;
            nothing has started then.
        LeaseError: If another process runs into the output folder; nothing has changed then.
        RunError: If a task fails.
    """
    settings = with_absolute_store(settings)
    refuse(unknown_tasks(settings.evaluation))
    check_writable(settings, output)
    with holding_folder(output, f"--output={output}"):
        root = output / "kfp"
        shutil.rmtree(root, ignore_errors=True)
        started = time.monotonic()
        ended = functools.partial(copy_report_so_far, root, output)
        progress = RunProgress(console, phases=settings.prune.phases, ended=ended)
        run_pipeline(build_pipeline(settings, local=True), root, output / "run.log", progress)
        seconds = time.monotonic() - started
        run = _resolved_run(root)
        shutil.rmtree(root, ignore_errors=True)
        return LocalRun(
            store=run["store"],
            key=run["key"],
            record=fetch_results(run, output),
            seconds=seconds,
            was_done="publish" not in progress.steps,
            found_done=progress.found_done,
        )


def fetch_results(handle: Mapping[str, str], output: Path) -> RunRecord:
    """Return what a finished run has measured.

    ``output/report.html`` becomes a copy of its report; where the store is a folder, ``output/model`` leads
    to its checkpoint, which is verified, and ``output/base`` to the model that it was made of.

    Args:
        handle: The run's handle.
        output: The folder.
    """
    run = Run.load(handle)
    measured, final = open_publication(run.report_uri()), open_publication(run.uri("final"))
    if final.folder is not None:  # a link will lead there
        final.verify(may_differ=(CARD,))
    (output / HTML).write_bytes(measured.read_bytes(HTML))
    _link(output / "model", final.folder)
    _link(output / "base", open_publication(run.base_uri).folder)
    return RunRecord.from_dict(measured.read_json(RECORD))


def copy_report_so_far(root: Path, output: Path, step: str) -> None:
    """Copy the report so far after an evaluation, if there is one."""
    if step == "evaluate":
        with contextlib.suppress(StorageError, OSError, ValueError):
            run = _resolved_run(root)
            (output / HTML).write_bytes(open_store(run["store"]).read_bytes(f"runs/{run['key']}/{HTML}"))


def _link(link: Path, folder: Path | None) -> None:
    """Let ``link`` lead to a folder, or to none, unless something else than a link is there."""
    if link.is_symlink():
        link.unlink()  # an earlier run's, which may have had another store
    if folder is not None and not link.exists():
        link.symlink_to(os.path.relpath(folder, link.parent.resolve()), target_is_directory=True)


def with_absolute_store(settings: Settings) -> Settings:
    """Return the settings with absolute paths for what others must find later: the store, MLflow's database.

    The base model and the texts keep their paths: they are part of the run key, which must not change when a
    project is moved.

    Raises:
        SettingsError: If the store's URI is of no known kind.
    """
    try:
        store = open_store(settings.storage.store).uri
    except StorageError as error:
        raise SettingsError([f"storage.store: {error}"]) from error
    return dataclasses.replace(
        settings,
        storage=dataclasses.replace(settings.storage, store=store),
        tracking=dataclasses.replace(settings.tracking, uri=absolute_uri(settings.tracking.uri)),
    )


def check_writable(settings: Settings, output: Path) -> None:
    """Check that the output folder and a store that is a folder can be written; both are created.

    Raises:
        SettingsError: If one cannot.
    """
    folders = {f"--output={output}": output}
    store = open_store(settings.storage.store).local_path("")
    if store is not None:
        folders[f"storage.store={settings.storage.store}"] = store
    check_folders(folders)


def run_pipeline(pipeline: BaseComponent, root: Path, log_path: Path, progress: RunProgress) -> None:
    """Run a pipeline of our components under ``kfp.local``.

    Args:
        pipeline: What ``dsl.pipeline`` returned.
        root: Folder for what the tasks put out.
        log_path: File that gets all that kfp and the tasks print.
        progress: Shows it.

    Raises:
        RunError: If a task fails.
    """
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(root), raise_on_error=True)
    try:
        with log_path.open("w") as log, _task_environment(), _quiet_kfp(), progress.reading(log):
            pipeline()
    except RuntimeError as error:  # kfp's word for "a task has failed"
        what = [f"{failure.step} failed: {failure.reason}" for failure in progress.failures] or [str(error)]
        raise RunError(
            f"{what[0]} The same command resumes after the last finished step; all output is in {log_path}."
        ) from error


def _resolved_run(root: Path) -> dict[str, str]:
    """Return what resolve-base gave out: the store and the run key."""
    (output,) = root.rglob("resolve-base/executor_output.json")
    return json.loads(output.read_text())["parameterValues"]["run"]


@contextlib.contextmanager
def _task_environment() -> Iterator[None]:
    """Let tasks find this very package, whatever the current directory holds, and clean up after them."""
    before = dict(os.environ)
    source = str(Path(core.__file__).parents[1])
    with scratch_folder() as scratch:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        os.environ["PYTHONSAFEPATH"] = "1"  # python -m would look into the current directory first
        os.environ[LOCAL] = str(os.getpid())
        os.environ["TMPDIR"] = str(scratch)  # each task leaves a copy of its component's source behind
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _quiet_kfp() -> Iterator[None]:
    """Silence kfp's remarks on settings that only a cluster uses, and its log outside of tasks."""
    silent = logging.NullHandler()
    logging.getLogger().addHandler(silent)  # with no handler at all, kfp's calls would add one to stderr
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(silent)
