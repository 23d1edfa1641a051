"""What becomes of a process that tokenizes, when something is wrong there."""

import os
import signal

import pytest

from core.data.workers import Batch, Workers
from core.errors import DataError
from core.settings.texts import TextSource


class Failing:
    """A reader to which something happens: an exception or an exit code, or a signal below 0."""

    def __init__(self, what):
        self.source, self._what = TextSource(path="a.jsonl"), what

    def read(self, numbers):
        if self._what is None:
            return Batch([], [], [])
        if isinstance(self._what, Exception):
            raise self._what
        if self._what < 0:
            os.kill(os.getpid(), -self._what)
        os._exit(self._what)


@pytest.mark.parametrize("processes", [0, 1])
def test_whatever_is_raised_is_one_line_and_the_process_goes_on(processes):
    with Workers([Failing(KeyError("a\nb")), Failing(MemoryError()), Failing(None)], processes) as workers:
        for reader, says in ((0, r"\('a\\nb'\)"), (1, r"\(MemoryError\)")):
            said = rf"^a\.jsonl: rows cannot be tokenized {says}\. Check the texts and the tokenizer\.$"
            with pytest.raises(DataError, match=said):
                workers.result(workers.ask(reader, [0]))
        assert workers.result(workers.ask(2, [0])) == Batch([], [], [])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (3, "ended with exit code 3. What it wrote"),
        (-signal.SIGTERM, "ended with exit code -15. What"),
        (-signal.SIGKILL, "ended as it was killed. Look for a lack of memory"),
    ],
)
def test_a_lack_of_memory_is_named_only_after_a_kill(what, says):
    with Workers([Failing(what)], 1) as workers, pytest.raises(DataError) as caught:
        workers.result(workers.ask(0, [0]))
    assert says in str(caught.value)
    assert ("memory" in str(caught.value)) == (what == -signal.SIGKILL)
