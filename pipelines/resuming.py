"""A run that is started again does nothing for the phases that are done: what KFP's SDK cannot write, in IR.

needs-run says which phase is the first with work. If that is 1, a run takes the way of all phases, else
another one, whose tasks do that phase and those after it. Argo starts no task after one that was skipped: so
there it is the last tasks that are skipped, those that would come after the last phase. A nested pipeline
whose condition does not hold costs the pod of its driver; all that waits for it costs nothing.

The second way is made of copies of the first one's tasks.
"""

import copy

from pipelines.cluster import PHASE_LABEL
from pipelines.ir import WAYS, Document

_FIRST = "int(inputs.parameter_values['first'])"
_TYPES = {"run": "STRUCT", "first": "NUMBER_INTEGER", "phase": "NUMBER_INTEGER"}
_TYPES |= dict.fromkeys(("checkpoint_uri", "result_uri", "data_uri"), "STRING")


def skip_done_phases(pipeline: Document, platform: Document, phases: int) -> None:
    """Set the condition of the way of all phases, and add the other way, in place."""
    tasks = next(
        component["dag"]["tasks"]
        for component in pipeline["components"].values()
        if "needs-run" in component.get("dag", {}).get("tasks", {})
    )
    go_on, prepare = WAYS
    tasks[prepare]["triggerPolicy"] = {"condition": f"{_FIRST} == 1"}
    evaluate, phase, publish = (tasks[name] for name in ("evaluate", "phase", "publish"))
    evaluate = copy.deepcopy(evaluate)
    evaluate["componentRef"]["name"] = _evaluation_of_any_phase(pipeline, platform)
    given = {name: _output("needs-run", name) for name in ("checkpoint_uri", "result_uri", "data_uri")}
    given |= {"run": _output("resolve-base", "run"), "first": _output("needs-run", "Output")}
    name = "go on after the phases done before"
    tasks[go_on] = _task(_like(phase, name, given), "comp-go-on", condition=f"{_FIRST} > 1")

    common = {name: _input(name) for name in ("run", "checkpoint_uri", "data_uri")}
    before = common | {"phase": _input("first", -1)}
    rest = {"evaluate-done": _like(evaluate, "evaluate the last phase that is done", before)}
    if phases > 1:
        from_first = common | {"phase": _input("first")}
        rest["phases-left"] = _task(_like(phase, "phases that are left", from_first), "comp-phases-left")
        left = _unrolled(phase, evaluate, phases)
        pipeline["components"]["comp-phases-left"] = _dag(left, from_first)
    result = {"run": _input("run"), "checkpoint_uri": _input("result_uri")}
    rest["publish"] = _like(publish, "publish", result, after=sorted(rest))
    pipeline["components"]["comp-go-on"] = _dag(rest, given)


def _evaluation_of_any_phase(pipeline: Document, platform: Document) -> str:
    """Add the component of evaluations whose phase is not known yet; returns its name."""
    executors = pipeline["deploymentSpec"]["executors"]
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    name, label = "comp-evaluate-left", "exec-evaluate-left"
    pipeline["components"][name] = pipeline["components"]["comp-evaluate"] | {"executorLabel": label}
    executors[label], configs[label] = (copy.deepcopy(kept["exec-evaluate"]) for kept in (executors, configs))
    configs[label]["podMetadata"]["labels"][PHASE_LABEL] = "left"
    return name


def _unrolled(phase: Document, evaluate: Document, phases: int) -> Document:
    """Return the tasks of as many phases as can be left: the first of all is not among them."""
    tasks: Document = {}
    checkpoint_uri, before = _input("checkpoint_uri"), list[str]()
    for number in range(1, phases):
        end = f"-{number}" if number > 1 else ""
        title, name = f"phase {number} of those left", f"phase-left{end}"
        given = {"run": _input("run"), "data_uri": _input("data_uri"), "phase": _input("phase", number - 1)}
        done = _like(phase, title, given | {"checkpoint_uri": checkpoint_uri}, after=before)
        checkpoint_uri, before = _output(name, "Output"), [name]
        tasks[name] = done | {
            "triggerPolicy": {"condition": f"int(inputs.parameter_values['phase']) <= {phases}"}
        }
        tasks[f"evaluate-left{end}"] = _like(
            evaluate, f"evaluate {title}", given | {"checkpoint_uri": checkpoint_uri}, after=before
        )
    return tasks


def _like(task: Document, title: str, given: Document, *, after: list[str] | None = None) -> Document:
    """Return a task as another one, with its own name and inputs."""
    producers = {
        edge["taskOutputParameter"]["producerTask"]
        for edge in given.values()
        if "taskOutputParameter" in edge
    }
    waits = sorted(producers.union(after or ()))
    made = copy.deepcopy(task) | {"inputs": {"parameters": given}, "taskInfo": {"name": title}}
    made.pop("dependentTasks", None)
    return made | ({"dependentTasks": waits} if waits else {})


def _task(task: Document, component: str, *, condition: str = "") -> Document:
    """Return a task that does another component."""
    policy = {"triggerPolicy": {"condition": condition}} if condition else {}
    return task | {"componentRef": {"name": component}} | policy


def _dag(tasks: Document, given: Document) -> Document:
    inputs = {name: {"parameterType": _TYPES[name]} for name in given}
    return {"dag": {"tasks": tasks}, "inputDefinitions": {"parameters": inputs}}


def _output(task: str, name: str) -> Document:
    return {"taskOutputParameter": {"outputParameterKey": name, "producerTask": task}}


def _input(name: str, more: int = 0) -> Document:
    """Return the edge of a group's own input; of a number, with so many more."""
    sign = "+" if more > 0 else "-"
    selector = {"parameterExpressionSelector": f"number_value {sign} {abs(more)}.0"} if more else {}
    return {"componentInputParameter": name} | selector
