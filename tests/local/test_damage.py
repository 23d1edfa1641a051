"""Damaged publications: every command names the file, and what it advises brings the file back."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from core.bases.importing import import_base
from core.errors import IntegrityError
from core.runs.run import Run
from core.settings.model import ModelSettings
from core.storage.publication import open_publication, publish, verify_folder
from core.storage.transfer import upload_apart
from pipelines.cli import main
from pipelines.local.run import fetch_results
from tests.support.evidence import note
from tests.support.project import recipe_with, run_all
from tests.support.publications import read

pytestmark = pytest.mark.slow

COMMANDS = {
    "inspect": ["inspect", "MODEL"],
    "generate": ["generate", "MODEL", "hello"],
    "evaluate": ["evaluate", "MODEL", "--text", "held-out.txt"],
    "export": ["export", "MODEL", "exported", "--format", "padded"],
    "benchmark": ["benchmark", "base", "--against", "MODEL", "--runtime", "torch"],
    "sensitivity": ["sensitivity", "MODEL", "--text", "held-out.txt"],
    "push": ["push", "MODEL", "user/model", "--dry-run"],
}
PLACE = "store/runs/0123456789ab/final"


@pytest.fixture
def folder(folder):
    """The tiny project with its base published as a result."""
    publish(folder / "base", PLACE)
    return folder


def publish_apart(monkeypatch):
    """Publish the base as one does that finds another's files beside the manifest."""
    from core.storage import publication as manifest

    def occupied(*_):
        raise manifest.OccupiedError

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "upload_beside", occupied)
        assert manifest.upload_apart is upload_apart
        publish(Path("base"), "apart/runs/0123456789ab/final")
    (inner,) = (path for path in Path("apart/runs/0123456789ab/final").iterdir() if path.is_dir())
    return inner


def flip(path):
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 1
    Path(path).write_bytes(data)


def call(name, model):
    arguments = [str(model) if argument == "MODEL" else argument for argument in COMMANDS[name]]
    return CliRunner().invoke(main, arguments)


def obey(error):
    """Do what the error advises, and nothing else."""
    command = re.search(r"Remove it with `(rm -rf .*?)` and run its recipe again", str(error))[1]
    subprocess.run(shlex.split(command), check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_the_damaged_file_and_the_way_back(folder, name):
    flip(f"{PLACE}/model.safetensors")
    result = call(name, PLACE)
    error = result.stderr.splitlines()[-1]
    where = folder / PLACE
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert error.startswith(f"error: {where}/model.safetensors is not what its manifest says: sha256 ")
    assert error.endswith(
        f"Remove it with `rm -rf '{where}'` and run its recipe again (`adapt-pruner run`, or `submit`): what "
        "is missing is computed again."
    )
    assert not (folder / "exported").exists()
    note("Integrity", f"{name} of a checkpoint with a flipped bit (folder)", "exit 1, named the file")


@pytest.mark.parametrize("how", ["link", "copy", "apart", "link to apart", "moved away"])
def test_damage_is_seen_however_the_publication_is_named(folder, how, monkeypatch):
    model = Path("model")
    inner = publish_apart(monkeypatch) if "apart" in how else Path(PLACE)
    if how == "copy":
        shutil.copytree(PLACE, model)
    elif how == "moved away":
        shutil.move(PLACE, model)
    else:
        model.symlink_to((inner.parent if how == "apart" else inner).resolve())
    shown = call("inspect", model)
    assert shown.exit_code == 0, shown.output
    assert re.search(
        r"^5 files, 0\.\d MB: verified against the manifest \(sha256\)$", shown.stdout, re.MULTILINE
    )
    damaged = inner if "apart" in how or how == "link" else model
    flip(damaged / "tokenizer.json")
    error = call("inspect", model).stderr
    assert f"{damaged.resolve()}/tokenizer.json is not what its manifest says" in error
    is_copy = how in ("copy", "moved away")
    assert (
        "Copy it again from where it came. If it was changed on purpose, remove MANIFEST" in error
    ) is is_copy
    if is_copy:
        (model / "MANIFEST.json").unlink()
        assert call("inspect", model).exit_code == 0


def test_what_is_no_part_of_a_publication_is_no_damage(folder):
    Path("base/README.md").write_text("---\nlicense: mit\n---\n")
    publish(Path("base"), "other")
    Path("other/notes.txt").write_text("mine")
    Path("other/README.md").write_text("---\nlicense: mit\n---\nedited\n")
    for name in ("inspect", "push"):
        result = call(name, "other")
        assert "manifest" not in result.stderr, name
    flip("base/model.safetensors")  # no manifest: an ordinary folder
    result = call("inspect", "base")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "manifest" not in result.stdout


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda place: (place / "model.safetensors").unlink(),
            "model.safetensors is not what .*: it is missing",
        ),
        (
            lambda place: (place / "config.json").write_bytes(b""),
            "config.json is not what .* bytes expected, 0",
        ),
        (lambda place: flip(place / "MANIFEST.json"), r"MANIFEST\.json is damaged: "),
    ],
)
def test_other_damage_is_named_too(folder, spoil, says):
    spoil(folder / PLACE)
    with pytest.raises(IntegrityError, match=says) as error:
        verify_folder(folder / PLACE)
    obey(error.value)
    assert not (folder / PLACE).exists()


def test_a_damaged_publication_is_not_taken_up_as_a_base_model(folder):
    flip(f"{PLACE}/model.safetensors")
    for spoil in (lambda: None, Path(PLACE, "model.safetensors").unlink):
        spoil()
        with pytest.raises(IntegrityError, match=r"final/model\.safetensors is not what its manifest says"):
            import_base(ModelSettings(base=PLACE), str(folder / "other"))
    assert not (folder / "other").exists()


def bits(folder):
    """The content of a publication, less what tells times and places."""
    content = read(Path(folder))
    return {name: data for name, data in content.items() if not name.startswith(("re", "README"))}


def damaged_error(handle, folder):
    with pytest.raises(IntegrityError) as error:
        fetch_results(handle, folder)
    return error.value


def test_a_run_whose_final_checkpoint_is_damaged_gets_it_back_as_advised(folder):
    recipe = recipe_with({"storage.store": str(folder / "store")})
    handle, final = run_all(recipe, folder / "artifacts")
    before = bits(final)
    assert {"config.json", "tokenizer.json"} < set(before)
    (folder / "output").mkdir()
    fetch_results(handle, folder / "output")
    flip(next(Path(final).glob("model-00002*")))
    assert run_all(recipe, folder / "artifacts")[0]["key"] == handle["key"]
    error = damaged_error(handle, folder / "output")
    assert f"{final}/model-00002" in str(error)
    (measured,) = Path(final).parent.glob("phases/02/evaluated-*/MANIFEST.json")
    written = measured.stat().st_mtime_ns
    obey(error)
    assert not Run.is_done(handle)
    run_all(recipe, folder / "artifacts")
    assert bits(final) == before
    assert measured.stat().st_mtime_ns == written, "what is there is not computed again"
    fetch_results(handle, folder / "output")
    note("Integrity", "the final checkpoint of a run that is done (folder)", "not done; back bit for bit")


@pytest.mark.parametrize(
    ("keep", "lost"),
    [("all", "phases/01/recovered"), ("last", "phases/02/scored"), ("2", "phases/02/pruned")],
)
def test_any_publication_of_a_run_that_is_done_comes_back_as_advised(folder, keep, lost):
    recipe = recipe_with({"storage.keep": keep, "storage.store": str(folder / "store")})
    handle, final = run_all(recipe, folder / "artifacts")
    uri, before_final = f"{handle['store']}/runs/{handle['key']}/{lost}", bits(final)
    before = bits(uri)
    weights = [*Path(uri).glob("*.safetensors"), *Path(uri).glob("*.json")]
    flip(weights[0])
    with pytest.raises(IntegrityError) as error:
        open_publication(uri).fetch(folder / "fetched")
    obey(error.value)
    run_all(recipe, folder / "artifacts")
    assert bits(open_publication(uri).fetch(folder / "fetched")) == before
    assert bits(open_publication(final).fetch(folder / "fetched")) == before_final
