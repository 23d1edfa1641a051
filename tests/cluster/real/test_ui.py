"""The UI of Kubeflow Pipelines in headless Chromium: the form, the graph, pictures, logs, Compare."""

import os
import time

import pytest

from tests.support.browser import CHROMIUM, browser
from tests.support.kubeflow import wait_until

UI = os.environ.get("KF_PIPELINES_UI_ENDPOINT", "").rstrip("/")
pytestmark = [
    pytest.mark.skipif(not UI, reason="KF_PIPELINES_UI_ENDPOINT is not set"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]
PATIENCE_S = 120


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


def visit(tab, path):
    tab.ask("Page.navigate", url="about:blank")  # a change of the fragment alone loads nothing
    tab.ask("Emulation.setDeviceMetricsOverride", width=1600, height=1200, deviceScaleFactor=1, mobile=False)
    tab.ask("Page.navigate", url=f"{UI}/#{path}")


def shows(tab, *texts):
    """Wait until all of these are on the page, its frames included."""
    frames = "[...document.querySelectorAll('iframe')].map(f => f.srcdoc || '').join(' ')"
    fields = "[...document.querySelectorAll('input, textarea')].map(f => f.value).join(' ')"
    script = f"document.body.innerText + {frames} + {fields}"
    found = ""

    def all_there():
        nonlocal found
        found = tab.evaluate(script) or ""
        return all(text in found for text in texts)

    wait_until(all_there, PATIENCE_S, f"{texts} are not shown, but {found[:2000]}")


def click(tab, selector, text):
    """Click on the first element of a kind that has a text, once it is there."""
    matches = f"e => e.innerText.trim().toLowerCase() == {text!r}"
    find = f"[...document.querySelectorAll({selector!r})].find({matches})"
    wait_until(lambda: tab.evaluate(f"!!({find})"), PATIENCE_S, f"no {selector} with {text}")
    tab.evaluate(f"({find}).click()")


def open_group(tab, *names):
    """Click through the groups of tasks of a graph."""
    for name in names:
        shows(tab, name)
        time.sleep(3)  # what is clicked on before the graph has its place opens nothing
        click(tab, ".react-flow__node button", name)
        click(tab, "button", "open sub-dag")


@pytest.fixture
def run(undisturbed, tab):
    recipe, followed = undisturbed
    visit(tab, f"/runs/details/{followed.run_ids[0]}")
    return recipe, followed.run_ids[0]


def test_the_graph_leads_to_the_tasks(run, tab):
    shows(tab, "run", "finalize")
    open_group(tab, "run")
    shows(tab, "resolve-base", "needs-run", "prepare", "evaluate dense model")
    shows(tab, "phase 1 of 1", "evaluate phase 1", "publish")


def test_a_task_has_its_pictures_and_its_log(run, tab):
    open_group(tab, "run")
    click(tab, ".react-flow__node button", "evaluate phase 1")
    click(tab, "button", "logs")
    shows(tab, "KFP Executor")
    click(tab, ".react-flow__node button", "picture")
    click(tab, "button", "visualization")
    shows(tab, "<svg")


def test_the_form_has_the_parameters(kubeflow, run, tab):
    with kubeflow.client.asked():
        version = kubeflow.client.get_run(run[1]).pipeline_version_reference
    ids = f"pipelineId={version.pipeline_id}&pipelineVersionId={version.pipeline_version_id}"
    visit(tab, f"/runs/new?{ids}")
    shows(tab, "base_model", "method", "recipe", "revision", "target", run[0]["model"]["base"], "75%")


def test_runs_stand_side_by_side(kubeflow, undisturbed, run, tab):
    visit(tab, f"/compare?runlist={run[1]},{run[1]}")
    shows(tab, "Run overview", kubeflow.name, "Scalar Metrics", "perplexity")
