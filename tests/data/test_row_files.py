"""Files of rows that are written one by one."""

import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file

from core.data.files import writing_rows
from core.errors import DataError


def test_rows_are_written_one_by_one_and_memory_holds_none_of_them(tmp_path):
    rng, shape = np.random.default_rng(0), (3000, 100)
    want = {"input_ids": rng.integers(0, 9**9, shape).astype(np.int32), "trained": np.ones(shape, np.uint8)}
    tracemalloc.start()
    try:
        with writing_rows(tmp_path / "x", {name: it.dtype.type for name, it in want.items()}, shape) as write:
            for row in zip(*want.values(), strict=True):
                write(row)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < sum(it.nbytes for it in want.values()) / 10
    found = load_file(tmp_path / "x")
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype
        assert np.array_equal(found[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("wrong", [DataError("no more text"), AssertionError("else rows of zeros")])
def test_a_file_without_all_its_rows_is_not_there(tmp_path, wrong):
    def write_one_of_three():
        with writing_rows(tmp_path / "x", {"trained": np.uint8}, (3, 4)) as write:
            write([np.ones(4, np.uint8)])
            if isinstance(wrong, DataError):
                raise wrong

    with pytest.raises(type(wrong), match=str(wrong)):
        write_one_of_three()
    assert not list(tmp_path.iterdir())
