"""Recurring runs: a real client against a strict stand-in of the API of Kubeflow Pipelines."""

import datetime
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from core.errors import ClusterError, SettingsError
from core.settings.recipe import load_recipe
from pipelines.cli import main
from pipelines.remote.client import connect
from pipelines.remote.schedules import change, list_schedules, schedule_name, set_schedule, six_fields
from pipelines.remote.submission import prepare
from tests.support.evidence import note
from tests.support.kfp_api import Refused, frame, is_cron, run_kfp_api
from tests.support.kfp_trial import error_of, write_trial

NIGHTLY = "0 0 2 * * *"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    return Path(write_trial(tmp_path, monkeypatch, model={"base": "models:/tiny@prod"}))


@pytest.fixture
def client(api):
    return connect(host=api.endpoint)


def schedule(api, *arguments):
    given = list(map(str, arguments))
    unchecked = ["--no-check"] if any(each.startswith("--cron") for each in given) else []
    return CliRunner().invoke(main, ["schedule", *given, *unchecked, "--host", api.endpoint])


def create(api, recipe, *arguments, cron=NIGHTLY):
    result = schedule(api, recipe, "--cron", cron, *arguments)
    assert result.exit_code == 0, result.output
    return result


def only(kept):
    (value,) = kept.values()
    return value


def test_a_schedule_starts_runs_of_the_recipe(api, recipe):
    result = create(api, recipe)
    made, version = only(api.recurring), only(api.versions)
    name = made["display_name"]
    assert result.stdout.splitlines() == [
        f"{name}: created, 0 0 2 * * * (UTC unless the cluster says otherwise)",
        f"{api.endpoint}/#/recurringrun/details/{made['recurring_run_id']}",
    ]
    assert re.fullmatch("trial-run-[0-9a-f]{8}", name)
    assert made["trigger"] == {"cron_schedule": {"cron": NIGHTLY}}
    assert (made["max_concurrency"], made["no_catchup"], made["status"]) == ("1", True, "ENABLED")
    parameters = {
        "base_model": "models:/tiny@prod",
        "revision": "",
        "target": "50%",
        "method": "adapt-pruner",
    }
    assert made["runtime_config"]["parameters"] == parameters
    run = api.fire(made["recurring_run_id"])
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert run["runtime_config"]["parameters"] == parameters


def test_a_schedule_has_one_run_at_a_time(api, recipe):
    create(api, recipe)
    (id_,) = api.recurring
    api.frames = [frame("RUNNING")]
    assert api.fire(id_)["recurring_run_id"] == id_
    assert api.fire(id_) is None


IN_PROGRESS = ("PENDING", "RUNNING", "CANCELING", "PAUSED")
OVER = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")


def fire(api, state):
    """Let the schedule fire, and others start runs after it in the same experiment."""
    (id_,) = api.recurring
    for _ in range(2):
        run = api.fire(id_)
        run["state"] = "SUCCEEDED"
    run["state"] = state
    for number in range(5):  # more than a page
        api.runs[f"other-{number}"] = run | {"run_id": f"other-{number}", "state": "RUNNING"}
        api.runs[f"other-{number}"] |= {"recurring_run_id": "another"}
        api.runs[f"other-{number}"]["created_at"] = datetime.datetime.now(datetime.UTC).isoformat()
    return run


@pytest.mark.parametrize("state", IN_PROGRESS)
@pytest.mark.parametrize("way", ["delete", "replace"])
def test_a_schedule_whose_run_is_in_progress_stays_unless_now_is_given(api, recipe, state, way):
    create(api, recipe)
    before = only(api.recurring)
    run, name = fire(api, state), before["display_name"]
    command = ["--delete", name] if way == "delete" else [recipe, "--cron", NIGHTLY, "--set=seed=7"]
    assert error_of(schedule(api, *command)) == (
        f"the run in progress of schedule {name} would end with it. Wait for its end, or give --now, and the "
        f"next run resumes it: {api.endpoint}/#/runs/details/{run['run_id']}"
    )
    assert only(api.recurring) is before
    assert before["status"] == "ENABLED"
    assert create(api, recipe).stdout.startswith(f"{name}: unchanged, "), "what changes nothing is done"
    result = schedule(api, *command, "--now")
    assert result.exit_code == 0, result.output
    assert before not in api.recurring.values()
    assert len(api.recurring) == (way == "replace")
    note("Faults", f"--{way} of a schedule whose run is in progress", "refused unless --now is given")


@pytest.mark.parametrize("state", OVER)
def test_a_schedule_whose_run_is_over_is_deleted(api, recipe, state):
    create(api, recipe)
    fire(api, state)
    assert schedule(api, "--delete", only(api.recurring)["display_name"]).exit_code == 0
    assert api.recurring == {}


def test_only_runs_since_a_schedule_exists_are_looked_at(api, recipe):
    create(api, recipe)
    made = only(api.recurring)
    fire(api, "SUCCEEDED")
    for each in api.runs.values():
        each |= {"created_at": "2020-01-01T00:00:00Z", "recurring_run_id": "another"}
    before = api.asked("GET /runs")
    assert schedule(api, "--delete", made["display_name"]).exit_code == 0
    assert api.asked("GET /runs") - before == 1


def test_the_same_command_again_changes_nothing(api, recipe):
    for _ in range(3):
        result = create(api, recipe)
    assert ": unchanged, " in result.stdout
    assert len(api.recurring) == len(api.versions) == 1
    assert api.asked("POST /recurringruns") == 1
    assert api.asked("DELETE") == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"cron": "0 30 4 * * 1"}, lambda made: made["trigger"]["cron_schedule"]["cron"] == "0 30 4 * * 1"),
        ({"arguments": ["--set=seed=7"]}, lambda made: True),
        (
            {"arguments": ["--param=recipe={calibration: {source: {path: a}}, storage: {store: 's3://b'}}"]},
            lambda made: "recipe" in made["runtime_config"]["parameters"],
        ),
        ({"arguments": ["--experiment=other"]}, lambda made: True),
        ({"arguments": ["--service-account=x"]}, lambda made: made["service_account"] == "x"),
    ],
    ids=["cron", "settings", "parameters", "experiment", "service account"],
)
def test_what_has_changed_replaces_the_schedule(api, recipe, arguments, what):
    create(api, recipe)
    (before,) = api.recurring
    result = create(api, recipe, *arguments.get("arguments", ()), cron=arguments.get("cron", NIGHTLY))
    assert ": updated, " in result.stdout
    made = only(api.recurring)
    assert made["recurring_run_id"] != before
    assert what(made)
    posts = [r for r in api.requests if r.startswith(("POST /recurringruns", "DELETE"))]
    assert posts[-2:] == ["POST /recurringruns", f"DELETE /recurringruns/{before}"]


def test_another_target_or_base_is_another_schedule(api, recipe):
    create(api, recipe)
    create(api, recipe, "--set=prune.target=80%")
    assert len(api.recurring) == 2
    create(api, recipe, "--param=base_model=models:/other@prod")
    assert len({made["display_name"] for made in api.recurring.values()}) == 3
    create(api, recipe, "--set=prune.amplitude=0.03")
    assert len(api.recurring) == 3


def test_an_update_that_is_killed_leaves_a_schedule_and_the_next_heals_it(api, client, recipe):
    """Break off before and between the two halves of an update."""
    changed = prepare(load_recipe(recipe, ("seed=7",)))
    for deadly in ("POST /recurringruns", "DELETE /recurringruns"):
        api.recurring.clear()
        set_schedule(client, prepare(load_recipe(recipe)), NIGHTLY, experiment="e")

        def refuse(request, deadly=deadly):
            if request.startswith(deadly):
                raise Refused(503, "gone")

        api.hook = refuse
        with pytest.raises(ClusterError, match="answers 503"):
            set_schedule(client, changed, NIGHTLY, experiment="e")
        assert len(api.recurring) == (1 if deadly.startswith("POST") else 2)
        assert any(made["status"] == "ENABLED" for made in api.recurring.values())
        api.hook = lambda request: None
        made, outcome = set_schedule(client, changed, NIGHTLY, experiment="e")
        assert outcome == ("updated" if deadly.startswith("POST") else "unchanged")
        assert only(api.recurring)["recurring_run_id"] == made.id
        note("Faults", "an update of a schedule breaks off", "a schedule is left, and the next leaves one")


def test_duplicates_on_several_pages_are_removed(api, client, recipe):
    submission = prepare(load_recipe(recipe))
    made, _ = set_schedule(client, submission, NIGHTLY, experiment="e")
    for number in range(7):
        copy = api.recurring[made.id] | {"recurring_run_id": f"copy-{number}"}
        api.recurring[f"copy-{number}"] = copy
        api.recurring[f"other-{number}"] = copy | {"display_name": f"other-{number}"}
    assert len(list_schedules(client)) == 15
    _, outcome = set_schedule(client, submission, NIGHTLY, experiment="e")
    assert outcome == "unchanged"
    names = [each["display_name"] for each in api.recurring.values()]
    assert names.count(made.name) == 1
    assert len(names) == 8


def test_a_paused_schedule_stays_paused_until_it_is_resumed(api, recipe):
    create(api, recipe)
    name = only(api.recurring)["display_name"]
    assert schedule(api, "--pause", name).stdout == f"{name}: paused\n"
    assert only(api.recurring)["status"] == "DISABLED"
    assert api.fire(next(iter(api.recurring))) is None
    assert "it is paused" in create(api, recipe).stderr
    result = create(api, recipe, cron="0 0 3 * * *")
    assert only(api.recurring)["status"] == "DISABLED"
    assert f"hint: it is paused. Resume it by: adapt-pruner schedule --resume {name}" in result.stderr
    assert schedule(api, "--resume", name).stdout == f"{name}: resumed\n"
    assert only(api.recurring)["status"] == "ENABLED"
    assert "paused" not in create(api, recipe, cron="0 0 4 * * *").stderr
    assert only(api.recurring)["status"] == "ENABLED"


def test_schedules_are_listed_and_deleted(api, recipe):
    assert schedule(api, "--list").stdout == f"{api.endpoint} has no schedules of adapt-pruner.\n"
    create(api, recipe)
    create(api, recipe, "--set=prune.target=80%")
    foreign = only({k: v for k, v in api.recurring.items() if "80%" in str(v)}) | {
        "recurring_run_id": "foreign",
        "display_name": "foreign",
        "pipeline_version_reference": {"pipeline_id": "of somebody else", "pipeline_version_id": "v"},
    }
    api.recurring["foreign"] = foreign
    names = sorted(made["display_name"] for made in api.recurring.values() if made is not foreign)
    schedule(api, "--pause", names[0])
    lines = [line.split() for line in schedule(api, "--list").stdout.splitlines()]
    assert lines[0] == ["name", "cron", "state", "base", "target"]
    assert [line[0] for line in lines[1:]] == names
    assert lines[1][1:8] == [*NIGHTLY.split(), "paused"]
    assert {line[-1] for line in lines[1:]} == {"50%", "80%"}
    assert lines[1][-2] == "models:/tiny@prod"
    assert schedule(api, "--delete", names[0]).stdout == f"{names[0]}: deleted\n"
    assert {made["display_name"] for made in api.recurring.values()} == {names[1], "foreign"}
    for what in ("--delete", "--pause", "--resume"):
        text = error_of(schedule(api, what, names[1][:-1]), status=2)
        assert text == f"{what}={names[1][:-1]} is not a schedule at {api.endpoint}. Known: {names[1]}."
    assert error_of(schedule(api, "--delete", "foreign"), status=2).endswith(f"Known: {names[1]}.")
    assert len(api.recurring) == 2


def test_every_duplicate_of_a_name_is_paused_and_deleted(api, client, recipe):
    made, _ = set_schedule(client, prepare(load_recipe(recipe)), NIGHTLY, experiment="e")
    api.recurring["copy"] = api.recurring[made.id] | {"recurring_run_id": "copy"}
    change(client, made.name, "pause")
    assert {each["status"] for each in api.recurring.values()} == {"DISABLED"}
    change(client, made.name, "delete")
    assert api.recurring == {}
    with pytest.raises(SettingsError, match=r"Known: none\.$"):
        change(client, made.name, "delete")


def test_what_strangers_have_written_steers_no_terminal(api, client, recipe):
    made, _ = set_schedule(client, prepare(load_recipe(recipe)), NIGHTLY, experiment="e")
    api.recurring[made.id]["runtime_config"] = {"parameters": {"base_model": "a\x1b[2Jb\nc"}}
    out = schedule(api, "--list").stdout
    assert "a [2Jb c" in out
    assert "\x1b" not in out
    note("Security", "a schedule whose parameters hold an escape sequence", "it is shown without it")


def test_several_users_have_schedules_of_their_own(recipe):
    with run_kfp_api(multi_user=True) as api:
        create(api, recipe, "--namespace=team")
        assert only(api.recurring)["namespace"] == "team"
        assert only(api.recurring)["display_name"] in schedule(api, "--list", "--namespace", "team").stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "schedule takes one of RECIPE, --list, --pause, --resume and --delete."),
        (["--list", "--pause", "x"], "schedule takes one of"),
        (["trial.yaml", "--list"], "schedule takes one of"),
        (["trial.yaml"], '--cron is missing. Say when, such as --cron "0 0 2 * * *"'),
        (["--list", "--now"], "--now needs RECIPE or --delete."),
        (["--list", "--cron", NIGHTLY], "--cron and --check need RECIPE. Add it, or leave --cron and "),
        (["--pause", "x", "--no-check", "--set", "a=1"], "--set and --check need RECIPE."),
        (["trial.yaml", "--cron", NIGHTLY, "--set", "storage.store=here"], "storage.store=here is a folder"),
        (
            ["trial.yaml", "--cron", NIGHTLY, "--param", "x=1"],
            "--param x is not a parameter of the pipeline.",
        ),
    ],
)
def test_wrong_commands_are_named_before_the_cluster_is_asked(api, recipe, arguments, problem):
    assert problem in error_of(schedule(api, *arguments), status=2)
    assert api.requests == []


@pytest.mark.parametrize(
    ("text", "six"),
    [
        ("0 0 2 * * *", "0 0 2 * * *"),
        ("0 2 * * *", "0 0 2 * * *"),
        (" */15  * * * * ", "0 */15 * * * *"),
        ("0 0 9 ? * mon-fri", "0 0 9 ? * mon-fri"),
    ],
)
def test_cron_expressions_have_six_fields(text, six):
    assert six_fields(text) == six
    assert is_cron(six)


@pytest.mark.parametrize("text", ["", "daily", "@every 6h", "0 2 * *", "0 0 2 * * * 2027"])
def test_other_than_five_or_six_fields_are_refused_here(api, recipe, text):
    """The server would read five fields as seconds, minutes and so on, and "@every 6h" as it likes."""
    message = error_of(schedule(api, recipe, f"--cron={text}"), status=2)
    assert message.startswith(f"--cron={text!r} must have six fields: second, minute, hour, day of the month")
    assert api.requests == []
    note("Faults", "a cron expression with other than five or six fields", "one line says what to write")


@pytest.mark.parametrize("text", ["0 60 2 * * *", "0 0 0 * * 7", "0 */0 0 * * *", "0 0 0 * FEV *"])
def test_the_server_judges_the_fields(api, recipe, text):
    message = error_of(schedule(api, recipe, f"--cron={text}"))
    assert "refuses the request (400): Invalid input error: Schedule cron is not supported" in message
    assert api.recurring == {}
    note("Faults", "a cron expression that the server refuses", "its reason, in one line")


def test_the_name_of_a_schedule_is_that_of_its_recipe_base_and_target(recipe):
    def name(*overrides):
        return schedule_name(load_recipe(recipe, overrides))

    same = ("seed=3", "prune.amplitude=0", "storage.store=s3://other/place", "prune.phases=4")
    other = ("name=other", "prune.target=80%", "model.base=hf://a/b", "model.base=models:/tiny@next")
    assert {name(change) for change in same} == {name()}
    assert len({name(), *(name(change) for change in other)}) == 5
