import pytest


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Let datasets keep nothing outside of the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
