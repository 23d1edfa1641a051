"""Waiting for what another thread or process does."""

import time


def wait_until(condition, *, within_s=60.0):
    """Wait until ``condition`` is true."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
