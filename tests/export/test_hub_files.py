"""What goes up of a checkpoint's folder, and what is refused before anything is asked."""

import shutil

import pytest

from core.errors import CheckpointError
from core.export.hub_files import checkpoint_files
from tests.support.uploads import SHARDS, goes_up, refused


def damage(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (damage("config.json", b"[1]"), "is not a model's config"),
        (lambda f: (f / SHARDS[2]).unlink(), "is missing, but the index names it"),
        (lambda f: (f / SHARDS[2]).write_bytes((f / SHARDS[2]).read_bytes()[:-9]), "not a valid safetensors"),
        (lambda f: shutil.copy(f / SHARDS[0], f / SHARDS[1]), "cannot be read"),
        (
            lambda f: shutil.copy(f / SHARDS[0], f / "model.safetensors"),
            "index does not name: model.safetensors",
        ),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "holds no model.safetensors"),
        (
            damage("optimizer.pt", b"x"),
            "holds pickles, which can run code where they are loaded: optimizer.pt",
        ),
        (lambda f: (f / "modeling_unequal_layers.py").unlink(), "names code that is missing"),
        (damage("README.md", b"---\nlicense: [\n---\n"), "README.md"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(checkpoint, change, says):
    change(checkpoint)
    assert says in refused(checkpoint_files, checkpoint, kind=CheckpointError)


def test_what_is_the_runs_own_or_hidden_stays_here(checkpoint):
    expected = set(goes_up(checkpoint))
    for name in (".cache/x", ".git/config", "__pycache__/m.pyc", ".model.part"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("x")
    (checkpoint / "pictures").mkdir()
    (checkpoint / "pictures" / "widths.svg").write_text("<svg/>")
    files = checkpoint_files(checkpoint)
    assert set(files) == expected | {"pictures/widths.svg"}
    assert list(files)[-len(SHARDS) :] == SHARDS
