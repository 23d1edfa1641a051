"""Recurring runs: a real client against a strict stand-in of the API of Kubeflow Pipelines."""

import itertools
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from core.errors import ClusterError, SettingsError
from core.settings.recipe import load_recipe
from pipelines.cli import main
from pipelines.remote.client import Access, connect
from pipelines.remote.cron import six_fields
from pipelines.remote.schedules import change, list_schedules, schedule_name, set_schedule
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
    return connect(Access(host=api.endpoint))


def schedule(api, *arguments):
    return CliRunner().invoke(main, ["schedule", *map(str, arguments), "--host", api.endpoint])


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
    parameters = {"base_model": "models:/tiny@prod", "target": "50%"}
    assert made["runtime_config"]["parameters"] == parameters
    run = api.fire(made["recurring_run_id"])
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert run["runtime_config"]["parameters"] == parameters


def test_no_two_runs_of_a_schedule_go_on_at_once(api, recipe):
    create(api, recipe)
    (id_,) = api.recurring
    api.frames = [frame("RUNNING")]
    assert api.fire(id_)["recurring_run_id"] == id_
    only(api.runs)["recurring_run_id"] = id_
    assert api.fire(id_) is None


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
    first = only(api.recurring)["display_name"]
    result = create(api, recipe, "--set=prune.target=80%")
    assert len(api.recurring) == 2
    assert f"hint: {first} is the same recipe with another base or target." in result.stderr
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
        assert made.version == only(api.recurring)["pipeline_version_reference"]["pipeline_version_id"]
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
    assert f"hint: it is paused. Start it by: adapt-pruner schedule --resume {name}" in result.stderr
    assert schedule(api, "--resume", name).stdout == f"{name}: resumed\n"
    assert only(api.recurring)["status"] == "ENABLED"
    assert "paused" not in create(api, recipe, cron="0 0 4 * * *").stderr
    assert only(api.recurring)["status"] == "ENABLED"


def test_schedules_are_listed_and_deleted(api, recipe):
    assert schedule(api, "--list").stdout == f"{api.endpoint} has no schedule of adapt-pruner.\n"
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
        assert text == f"{what}={names[1][:-1]} is no schedule at {api.endpoint}. Did you mean {names[1]}?"
    assert error_of(schedule(api, "--delete", "foreign"), status=2).endswith(f"Known: {names[1]}.")
    assert len(api.recurring) == 2


def test_every_duplicate_of_a_name_is_paused_and_deleted(api, client, recipe):
    made, _ = set_schedule(client, prepare(load_recipe(recipe)), NIGHTLY, experiment="e")
    api.recurring["copy"] = api.recurring[made.id] | {"recurring_run_id": "copy"}
    assert change(client, made.name, "pause") == 2
    assert {each["status"] for each in api.recurring.values()} == {"DISABLED"}
    assert change(client, made.name, "delete") == 2
    with pytest.raises(SettingsError, match=r"There is none yet\.$"):
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
        ([], "schedule takes RECIPE, --list, --pause, --resume or --delete: one of them."),
        (["--list", "--pause", "x"], "one of them."),
        (["trial.yaml", "--list"], "one of them."),
        (["trial.yaml"], '--cron is missing. Say when, such as --cron "0 0 2 * * *"'),
        (["--list", "--cron", NIGHTLY], "--cron, --set, --param and --service-account go"),
        (["trial.yaml", "--cron", NIGHTLY, "--set", "storage.store=here"], "storage.store=here is a folder"),
        (["trial.yaml", "--cron", NIGHTLY, "--param", "x=1"], "--param x is no parameter of the pipeline."),
    ],
)
def test_wrong_commands_are_named_before_the_cluster_is_asked(api, recipe, arguments, problem):
    assert problem in error_of(schedule(api, *arguments), status=2)
    assert api.requests == []


GOOD = {
    "0 0 2 * * *": "0 0 2 * * *",
    "0 2 * * *": "0 0 2 * * *",
    " */15  * * * * ": "0 */15 * * * *",
    "@daily": "0 0 0 * * *",
    "@Hourly": "0 0 * * * *",
    "0 0 9 ? * mon-fri": "0 0 9 ? * MON-FRI",
    "0 0 0 1,15 JAN-jun/2 *": "0 0 0 1,15 JAN-JUN/2 *",
    "5/10 0-59/5 0 29 2 *": "5/10 0-59/5 0 29 2 *",
    "59 59 23 31 12 6": "59 59 23 31 12 6",
    "0 0 0 31 4/1 *": "0 0 0 31 4/1 *",  # from April on: some of these months are long enough
}
BAD = {
    "": "must have six fields",
    "daily": "must have six fields",
    "@every 6h": "must have six fields",
    "0 2 * *": "must have six fields",
    "0 0 2 * * * 2027": "must have six fields",
    "0 60 2 * * *": "minute 60 must lie between 0 and 59.",
    "0 0 24 * * *": "hour 24 must lie between 0 and 23.",
    "0 0 0 0 * *": "day of the month 0 must lie between 1 and 31.",
    "0 0 0 * 13 *": "month 13 must lie between 1 and 12.",
    "0 0 0 * * 7": "day of the week 7 must lie between 0 and 6. Sunday is 0.",
    "0 0 0 * * TUE-MON": "day of the week TUE-MON runs backwards.",
    "0 */0 0 * * *": "minute */0 has a step of 0.",
    "0 a 0 * * *": "minute A is not understood.",
    "0 0 0 * FEV *": "month FEV is not understood. Write numbers or one of JAN, FEB,",
    "0 1- 0 * * *": "minute 1- is not understood.",
    "0 1,,2 0 * * *": "minute 1,,2 is not understood.",
    "0 -1 0 * * *": "minute -1 is not understood.",
    "0 \u0661 0 * * *": "minute \u0661 is not understood.",
    "0 0 0 30 2 *": "never comes",
    "0 0 0 31 4,6,9,11 *": "never comes",
}


@pytest.mark.parametrize("text", GOOD)
def test_cron_expressions_become_six_fields(text):
    assert six_fields(text) == GOOD[text]
    assert is_cron(GOOD[text])


@pytest.mark.parametrize("text", BAD)
def test_a_bad_cron_expression_is_one_line(api, recipe, text):
    message = error_of(schedule(api, recipe, f"--cron={text}"), status=2)
    assert message.startswith(f"--cron={text!r}")
    assert BAD[text] in message
    assert api.requests == []
    note("Faults", "a cron expression that is wrong", "one line names the field and what to write")


def test_every_field_is_judged_as_the_server_judges_it():
    """Every span, step and list over small numbers, in each field, by two readers of their own."""
    numbers = ("0", "1", "6", "7", "12", "31", "60", "x", "*", "?", "")
    parts = [*numbers, *(f"{a}{sign}{b}" for sign in "-/," for a, b in itertools.product(numbers, repeat=2))]
    parts += ["1-6/2", "6-1/2", "1-6/0", "*/5", "1-2-3", "1/2/3", "MON", "SUN-SAT", "DEC", "jan-MAR"]
    accepted = 0
    for index, part in itertools.product(range(6), parts):
        fields = ["0", "0", "0", "1", "1", "*"]
        fields[index] = part
        text = " ".join(fields)
        try:
            six_fields(text)
            taken = len(text.split()) == 6
        except SettingsError as error:
            taken = "never comes" in str(error)
        if len(text.split()) == 6:
            assert taken == is_cron(text), text
            accepted += taken
    assert accepted > 100


def test_the_api_judges_last(api, client, recipe):
    with pytest.raises(ClusterError, match="Schedule cron is not supported"):
        set_schedule(client, prepare(load_recipe(recipe)), "0 0 25 * * *", experiment="e")


def test_the_name_of_a_schedule_is_that_of_its_recipe_base_and_target(recipe):
    def name(*overrides):
        return schedule_name(load_recipe(recipe, overrides))

    same = ("seed=3", "prune.amplitude=0", "storage.store=s3://other/place", "prune.phases=4")
    other = ("name=other", "prune.target=80%", "model.base=hf://a/b", "model.base=models:/tiny@next")
    assert {name(change) for change in same} == {name()}
    assert len({name(), *(name(change) for change in other)}) == 5
