"""What MLflow's pages show of a run beside its figures: name, data sets, who started it, a description."""

import getpass
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from core.redaction import without_password
from core.settings.addresses import base_name
from core.settings.schema import Settings
from core.settings.texts import TextSource

EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else its page opens as one about GenAI
    "mlflow.experiment.primaryMetric.name": "perplexity",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
    "mlflow.note.content": (
        "Runs of adapt-pruner. A run's metrics have one point a phase (step 0 is the dense model); the runs "
        "nested in it are its steps. `report.html` is among its artifacts."
    ),
}
"""Tags of an experiment; those that it has stay as they are."""

_MAX_NAME = 500


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set as MLflow lists it: where it is, not what it holds."""

    name: str
    digest: str
    source_type: str
    source: str
    context: str
    """``calibration``, ``training`` or ``evaluation``."""


def run_title(settings: Settings) -> str:
    """Return what a run is called: which model was made how small, by which method.

    The recipe's ``name`` and ``seed`` follow where they are not the defaults.
    """
    target = re.sub(r"\s*%$", " %", settings.prune.target)
    more = [settings.name] if settings.name != Settings.name else []
    more += [f"seed {settings.seed}"] if settings.seed != Settings.seed else []
    extra = f" ({', '.join(more)})" if more else ""
    return f"{short_base(settings.model.base)} → {target} {settings.prune.method}{extra}"


def short_base(base: str) -> str:
    """Return the telling part of a base model's address."""
    name = without_password(base_name(base)).rstrip("/")
    if result := re.search(r"/runs/([^/]+)/(?:final|phases/.*)$", name):
        return f"run {result[1]}"  # the folder of a result says nothing
    return name.removeprefix("models:/").rpartition("/")[2].removesuffix(".gguf") or name


def summary_params(settings: Settings) -> dict[str, str]:
    """Return the params that stand first where runs are compared: MLflow sorts capitals before the rest."""
    return {
        "Base": short_base(settings.model.base),
        "Method": settings.prune.method,
        "Target": settings.prune.target,
    }


def origin_tags(*, job: str, local: bool) -> dict[str, str]:
    """Return the tags of who started a run and by what, as far as it is known.

    Args:
        job: The execution.
        local: Whether it is a local run; nobody is known to have started a pod.
    """
    try:
        release = version("adapt-pruner")
    except PackageNotFoundError:  # run from its source
        release = ""
    name = f"adapt-pruner {release}".strip()
    if not local:
        return {"mlflow.source.type": "JOB", "mlflow.source.name": f"{name}, KFP job {job}"}
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": name}
    try:
        return tags | {"mlflow.user": getpass.getuser()}
    except (OSError, KeyError):  # a user id without a name
        return tags


def data_sets(settings: Settings) -> Iterator[DataSet]:
    """Yield what a run reads: texts to calibrate, train and measure on, and benchmarks."""
    sources = [("calibration", settings.calibration.source)]
    sources += [("training", source) for source in settings.training.sources if settings.training.total_steps]
    sources += [("evaluation", settings.evaluation.perplexity)]
    yield from (_text_set(source, context) for context, source in sources if source is not None)
    for task in settings.evaluation.tasks:
        where = settings.evaluation.task_data.get(task, "")
        yield _data_set(task, {"task": task, "uri": where or "its own place on the hub"}, "evaluation")


def perplexity_set(settings: Settings) -> DataSet | None:
    """Return the data set that perplexity is measured on."""
    source = settings.evaluation.perplexity
    return None if source is None else _text_set(source, "evaluation")


def _text_set(source: TextSource, context: str) -> DataSet:
    path = without_password(source.path)
    split = source.split if source.split != TextSource.split else ""
    parts = [path.rstrip("/").rpartition("/")[2], source.subset, split]
    told = {"split": source.split, "subset": source.subset, "revision": source.revision}
    told = {name: value for name, value in told.items() if value}
    return _data_set(" ".join(filter(None, parts)), {"uri": path, **told}, context)


def _data_set(name: str, source: dict[str, str], context: str) -> DataSet:
    text = json.dumps(source, sort_keys=True)
    return DataSet(
        name=name[:_MAX_NAME],
        # Of one name and digest MLflow lists one, in one context.
        digest=hashlib.sha256(f"{context} {text}".encode()).hexdigest()[:8],
        source_type="s3" if source["uri"].startswith("s3://") else "local",
        source=text,
        context=context,
    )
