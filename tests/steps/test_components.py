"""The components: thin over core.steps, and what they do around a step."""

import ast
import importlib
import inspect
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kfp import dsl
from rich.console import Console

from components.decorator import component
from components.runtime import task
from core.errors import AdaptPrunerError, TargetError
from core.storage.owner import LOCAL
from pipelines.local.progress import RunProgress
from pipelines.local.run import RunError, run_pipeline

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "resolve_base",
    "needs_run",
    "prepare_data",
    "calibrate",
    "score_layers",
    "prune_step",
    "recover_train",
    "evaluate",
    "publish",
    "finalize",
    "check_pod",
)


def source_of(name):
    return (ROOT / "components" / f"{name}.py").read_text()


def function_of(name):
    (function,) = [node for node in ast.parse(source_of(name)).body if isinstance(node, ast.FunctionDef)]
    return function


def call_of_the_step(name):
    (call,) = [
        node
        for node in ast.walk(function_of(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("run_")
    ]
    return call


def test_there_is_one_file_a_component():
    files = {path.stem for path in (ROOT / "components").glob("*.py")}
    assert files == {*NAMES, "__init__", "decorator", "runtime"}


@pytest.mark.parametrize("name", NAMES)
def test_the_body_is_one_short_call_into_core_steps(name):
    function = function_of(name)
    assert function.end_lineno - function.body[1].lineno < 15
    assert call_of_the_step(name).func.id == f"run_{name}"
    imports = [node.module for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
    assert imports[0] == "components.runtime"
    assert all(module.startswith(("core.", "components.nodes.")) for module in imports[1:])


@pytest.mark.parametrize("name", NAMES)
def test_the_call_fits_the_steps_signature(name):
    step = getattr(importlib.import_module(f"core.steps.{name}"), f"run_{name}")
    call = call_of_the_step(name)
    assert not call.args
    inspect.signature(step).bind(**{keyword.arg: None for keyword in call.keywords})
    returns = inspect.signature(step).return_annotation not in (None, "None")
    assert returns == any(isinstance(node, ast.Return) for node in ast.walk(function_of(name)))


@pytest.mark.parametrize("name", NAMES)
def test_the_task_is_named_like_the_component(name):
    built = getattr(importlib.import_module(f"components.{name}"), name)
    (call,) = [
        node
        for node in ast.walk(function_of(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "task"
    ]
    assert call.args[0].value == built.name == name.replace("_", "-")
    assert (len(call.args) == 2) == ("phase" in inspect.signature(built.python_func).parameters)


def python(code, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


PREAMBLE = """
import logging
from components.runtime import task
from core.errors import TargetError
log = logging.getLogger("core.somewhere")
"""


def test_log_lines_of_a_task_name_its_phase_and_step():
    process = python(PREAMBLE + "with task('recover-train', 3): log.info('loss 2.5')")
    _, stderr = process.communicate(timeout=60)
    lines = [line.split(" ", 1)[1] for line in stderr.splitlines()]
    assert lines[:2] == ["INFO phase 3 recover-train: started", "INFO phase 3 recover-train: loss 2.5"]
    assert lines[2].startswith("INFO phase 3 recover-train: done in ")
    assert process.returncode == 0


def test_libraries_are_heard_from_warnings_on_whatever_kfp_has_set():
    lines = [
        "import logging",
        "logging.basicConfig(format='[KFP Executor] %(message)s', level=logging.INFO)",  # as it does
        "boto = logging.getLogger('botocore.credentials')",
        PREAMBLE,
        "logging.info('before')",
        "with task('publish'):",
        "    boto.info('Found credentials in environment variables.')",
        "    boto.warning('a warning')",
        "    boto.error('an error')",
        "    log.info('ours')",
        "logging.info('after')",
    ]
    _, stderr = python("\n".join(lines)).communicate(timeout=60)
    heard = [line.rpartition("publish: ")[2].removeprefix("[KFP Executor] ") for line in stderr.splitlines()]
    assert heard[-1] == "after"
    assert heard[:-2] == ["before", "started", "a warning", "an error", "ours"]


def test_an_error_that_is_meant_for_the_user_is_one_line():
    process = python(
        PREAMBLE + "with task('publish'): raise TargetError('prune.target=1 cannot be reached.')"
    )
    _, stderr = process.communicate(timeout=60)
    assert stderr.splitlines()[1:] == ["error: prune.target=1 cannot be reached."]
    assert process.returncode == 1


def test_any_other_error_has_its_traceback_and_the_line():
    process = python(PREAMBLE + "with task('publish'): raise ValueError('a\\nb')")
    _, stderr = process.communicate(timeout=60)
    assert "Traceback (most recent call last)" in stderr
    assert stderr.splitlines()[-1] == "error: ValueError: a b"
    assert process.returncode == 1


POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
TERMINATION = "import components.runtime, pathlib; components.runtime._TERMINATION_LOG = pathlib.Path({!r})\n"


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("TargetError('prune.target=1 cannot', 'b is 2.')", "error: prune.target=1 cannot error: b is 2."),
        ("ValueError('a\\nb s3://name:pass/word@host/x')", "error: ValueError: a b s3://name:***@host/x"),
        ("TargetError('€' * 4000)", "error: " + "€" * ((4096 - len("error: ")) // 3)),
    ],
)
def test_in_a_pod_kubernetes_is_told_why_a_task_failed(tmp_path, raised, told):
    log = tmp_path / "termination-log"
    log.touch()
    code = TERMINATION.format(str(log)) + PREAMBLE + f"with task('publish'): raise {raised}"
    process = python(code, env=POD)
    process.communicate(timeout=60)
    assert log.read_text() == told
    assert len(log.read_bytes()) <= 4096
    assert process.returncode == 1


def test_elsewhere_nothing_is_written(tmp_path):
    """Neither without Kubernetes nor where it has made no such file, nor where it cannot be written."""
    there, missing = tmp_path / "termination-log", tmp_path / "missing"
    there.touch()
    code = PREAMBLE + "with task('publish'): raise TargetError('x')"
    python(TERMINATION.format(str(there)) + code).communicate(timeout=60)
    python(TERMINATION.format(str(missing)) + code, env=POD).communicate(timeout=60)
    assert there.read_text() == ""
    assert not missing.exists()
    _, stderr = python(TERMINATION.format("/proc/version") + code, env=POD).communicate(timeout=60)
    assert stderr.splitlines()[1:] == ["error: x"]


def test_a_task_ends_when_the_local_run_that_reads_its_output_is_gone():
    code = PREAMBLE + "import time\nwith task('publish'):\n    print('up', flush=True)\n    time.sleep(60)"
    process = python(code, env={LOCAL: "1"})
    assert process.stdout.readline() == "up\n"
    process.stdout.close()
    assert process.wait(timeout=10) == 1
    process.stderr.close()


def task_that_fails():
    with task("calibrate", 1):
        logging.getLogger("core.x").info("inside")
        raise TargetError("no")


def test_in_process_a_task_leaves_errors_and_logging_as_they_were(capsys):
    core = logging.getLogger("core")
    before = list(core.handlers), core.level, core.propagate
    hook = sys.excepthook
    try:
        with pytest.raises(TargetError):
            task_that_fails()
        logging.getLogger("core.x").info("outside")
    finally:
        sys.excepthook = hook
    assert (core.handlers, core.level, core.propagate) == before
    assert "phase 1 calibrate: inside" in capsys.readouterr().err


@component
def chatty(phase: int, text: str) -> str:
    from components.runtime import task

    with task("chatty", phase):
        import logging

        logging.getLogger("core.x").info("says %s", text)
        if phase == 2:
            logging.getLogger("core.x").warning("phase 2 chatty: already done")
        logging.getLogger("other").info("whispers %s", text)
        logging.getLogger("other").warning("mutters %s", text)
        print("printed", text)
        return text


@component
def unreachable(text: str):
    from components.runtime import task

    with task("unreachable"):
        from core.errors import TargetError

        raise TargetError("prune.target=1 cannot be reached. Raise it.")


@component
def killed(text: str):
    from components.runtime import task

    with task("killed"):
        import os

        os.kill(os.getpid(), 9)


@component
def silent(text: str):
    raise ValueError("before the task said anything")


def run(pipeline, tmp_path):
    console = Console(record=True, file=(tmp_path / "console").open("w"), width=200)
    progress = RunProgress(console, phases=12)
    try:
        run_pipeline(pipeline, tmp_path / "kfp", tmp_path / "run.log", progress)
    finally:
        console.file.close()
    return (tmp_path / "console").read_text().splitlines(), progress


def fails(first, tmp_path):
    @dsl.pipeline(name="fails")
    def pipeline():
        chatty(phase=1, text="late").after(first(text=""))

    with pytest.raises(RunError) as error:
        run(pipeline, tmp_path)
    return str(error.value).replace(str(tmp_path), "TMP")


def test_a_local_run_shows_our_lines_only_and_keeps_the_rest_in_the_log(tmp_path, capsys):
    @dsl.pipeline(name="works")
    def pipeline():
        chatty(phase=2, text=chatty(phase=0, text="hello").output)

    environment, handlers = dict(os.environ), list(logging.getLogger().handlers)
    lines, progress = run(pipeline, tmp_path)
    assert [re.sub(r"in .* s$", "in N s", " ".join(line.split())) for line in lines] == [
        "dense model chatty started",
        "dense model chatty says hello",
        "dense model chatty done in N s",
        "phase 2/12 chatty started",
        "phase 2/12 chatty says hello",
        "phase 2/12 chatty already done",
    ]
    assert progress.steps == ["chatty", "chatty"]
    assert progress.found_done == 1
    assert progress.failures == []
    log = (tmp_path / "run.log").read_text()
    assert "printed hello" in log
    assert "mutters hello" in log
    assert "whispers" not in log
    assert log.count("says hello") == 2
    assert "Got executor_input" in log
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert (dict(os.environ), logging.getLogger().handlers) == (environment, handlers)


ADVICE = "The same command resumes after the last finished step; all output is in TMP/run.log."


def test_a_failed_task_ends_the_run_with_its_own_words(tmp_path):
    message = fails(unreachable, tmp_path)
    assert message == f"unreachable failed: prune.target=1 cannot be reached. Raise it. {ADVICE}"
    assert issubclass(RunError, AdaptPrunerError)


def test_a_killed_task_is_named(tmp_path):
    message = fails(killed, tmp_path)
    assert message == f"killed failed: the system killed it, most likely for lack of memory. {ADVICE}"


def test_a_task_that_fails_before_it_says_anything_is_named_too(tmp_path):
    message = fails(silent, tmp_path)
    assert message == f"silent failed: ValueError: before the task said anything. {ADVICE}"


def test_tasks_import_this_package_even_where_the_current_directory_holds_another(tmp_path, monkeypatch):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "__init__.py").write_text("raise RuntimeError('the wrong core')")
    monkeypatch.chdir(tmp_path)

    @dsl.pipeline(name="works")
    def pipeline():
        chatty(phase=1, text="hello")

    started = time.monotonic()
    lines, _ = run(pipeline, tmp_path)
    assert any("says hello" in line for line in lines)
    assert time.monotonic() - started < 30
