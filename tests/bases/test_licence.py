"""What a base model states of its licence, wherever it comes from."""

import contextlib
import json
import shutil
from pathlib import Path

import gguf
import pytest

from core.bases.importing import import_base
from core.bases.licence import card_facts, gguf_facts, known_facts
from core.settings.model import ModelSettings
from core.storage.publication import open_publication

CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: [en, de]\n---\n# A base\n"
STATED = {"license": "other", "license_name": "tiny", "license_link": "LICENSE", "language": ["en", "de"]}


def write_gguf(path, entries):
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in entries.items():
        (writer.add_array if isinstance(value, list) else writer.add_string)(f"general.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CARD, STATED),
        ("---\nlicense: mit\nlanguage: no\n---\n", {"license": "mit", "language": ["no"]}),
        ("---\r\nlicense: mit\r\n---\r\ntext", {"license": "mit"}),
        ("---\nlicense:\n- mit\n- gpl\nlanguage: en\n---\n", {"language": ["en"]}),
        ("---\nlicense: 7\nlanguage: [1, en]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense: ''\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("# A base\n\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_a_card_states_what_its_front_matter_says(tmp_path, text, expected):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert card_facts(tmp_path / "README.md") == expected


def test_a_card_that_cannot_be_read_states_nothing(tmp_path):
    assert card_facts(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert card_facts(tmp_path / "README.md") == {}


@pytest.mark.parametrize("stated", [None, [], "mit", {"license": {"id": "mit"}}, {"license": "a\nb"}])
def test_what_is_no_fact_is_none(stated):
    assert known_facts(stated) == {}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"license": "apache-2.0", "languages": ["en"]}, {"license": "apache-2.0", "language": ["en"]}),
        ({"license": "Apache-2.0"}, {"license": "apache-2.0"}),
        (
            {"license": "Tiny Licence, version 2", "license.link": "https://example.org"},
            {
                "license": "other",
                "license_name": "tiny-licence-version-2",
                "license_link": "https://example.org",
            },
        ),
        ({"license": "other", "license.name": "tiny"}, {"license": "other", "license_name": "tiny"}),
        ({"name": "nothing of it"}, {}),
    ],
)
def test_a_gguf_file_states_what_its_metadata_says(tmp_path, entries, expected):
    assert gguf_facts(write_gguf(tmp_path / "m.gguf", entries)) == expected


def take_up(folder, store):
    with contextlib.chdir(folder.parent):
        uri, revision = import_base(ModelSettings(base=folder.name), str(store))
    return Path(uri), revision


def test_a_folder_brings_its_licence_and_stays_as_it_is(project, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(project / "base", base)
    bare, revision = take_up(base, tmp_path / "bare")
    assert not (bare / "adapt_pruner.json").exists()
    made = {"base": "older", "phase": 3, "license": "mit"}
    for name, content in {
        "README.md": CARD,
        "LICENSE": "l",
        "NOTICE.txt": "n",
        "USE_POLICY.md": "u",
        "adapt_pruner.json": json.dumps(made),
    }.items():
        (base / name).write_text(content)
    uri, changed = take_up(base, tmp_path / "store")
    assert changed != revision
    assert json.loads((uri / "adapt_pruner.json").read_text()) == made | STATED
    assert json.loads((base / "adapt_pruner.json").read_text()) == made
    names = set(open_publication(str(uri)).manifest.paths)
    assert names == {path.name for path in base.iterdir()} - {"README.md"}
