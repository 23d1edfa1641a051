import inspect
import os
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.storage.interface import Store
from core.storage.store import open_store
from tests.support.servers import BUCKET, S3Server
from tests.support.servers import s3_server as run_s3_server


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Leave slow tests out once it is later than ``TESTS_END`` (seconds since 1970), which CI sets."""
    if item.get_closest_marker("slow") and time.time() > float(os.environ.get("TESTS_END", "inf")):
        pytest.skip(f"later than TESTS_END: {item.nodeid}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Let captured logs pass from one process to another, whatever a hostile file has put into them."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session", autouse=True)
def quick_compilations() -> Iterator[None]:
    """Tell kfp the names of its callers without reading their source.

    It looks at the whole stack for one name, 56 times a pipeline. With all that tests import, and the frames
    of pytest, that took 98 % of a compilation.
    """
    module = sys.modules.get("kfp.dsl.pipeline_task")
    if module is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "inspect", SimpleNamespace(**vars(inspect) | {"stack": callers}))
        yield


def callers() -> list[inspect.FrameInfo]:
    """Return what ``inspect.stack`` does, without source."""
    return [
        inspect.FrameInfo(frame, frame.f_code.co_filename, line, frame.f_code.co_name, None, None)
        for frame, line in traceback.walk_stack(sys._getframe(1))
    ]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with run_s3_server() as server:
        yield server


@pytest.fixture
def s3_store_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own on the real server, to which the environment points."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a store: once in a folder, once on the real S3 server."""
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_store_uri")


@pytest.fixture
def store(store_uri: str) -> Store:
    """A store without content: once in a folder, once on the real S3 server."""
    return open_store(store_uri)


@pytest.fixture(scope="session")
def tokenizer_definition() -> str:
    return define_tokenizer()


def define_tokenizer() -> str:
    """A byte-level BPE of 400 tokens with SmolLM2's special tokens, trained on Python's own manual."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(list(topics.values())[:20], trainer)
    return bpe.to_str()


def tokenizer_of(definition):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(definition),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


@pytest.fixture
def tokenizer(tokenizer_definition):
    """The same as a fresh transformers tokenizer without a chat template; a test may change it."""
    return tokenizer_of(tokenizer_definition)


@pytest.fixture(scope="session")
def project(tmp_path_factory, tokenizer_definition):
    """The folder of a tiny project (see ``tests.support.project``); tests change copies of it."""
    from tests.support.project import make_project

    return make_project(tmp_path_factory.mktemp("project"), tokenizer_of(tokenizer_definition))


@pytest.fixture(scope="session")
def smaller(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project's base model, but with layers of unequal sizes, and its tokenizer."""
    import torch

    from core.model.build import build_model
    from core.model.checkpoint import save_model
    from core.model.config import config_with_layers, load_config
    from tests.support.models import UNEQUAL

    folder = tmp_path_factory.mktemp("smaller") / "model"
    torch.manual_seed(0)
    model = build_model(config_with_layers(load_config(project / "base"), UNEQUAL))
    save_model(model, folder, companions=project / "base", provenance={})
    return folder


@pytest.fixture
def folder(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny project, which is the current directory."""
    copy = shutil.copytree(project, tmp_path / "my project")
    monkeypatch.chdir(copy)
    return copy
