"""Small file systems that fill up or cannot be written, where this process may mount one."""

import contextlib
import multiprocessing
import os
import resource
import subprocess

import pytest


@contextlib.contextmanager
def tiny_disk(folder, size="1m"):
    """Mount a file system of ``size`` at ``folder``; the test is skipped where that is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def read_only(folder):
    """Let nobody, not even root, write to ``folder`` until the block ends."""
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,ro,bind", folder)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(*arguments):
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a file system is not permitted here: {done.stderr.strip()}")


def resize(disk, size):
    _mount("-o", f"remount,size={size}", disk)


def fill(folder):
    """Write to a disk until it is full; return the file that fills it."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def limited(function, *arguments):
    """Return what a process raises that may write no file beyond 500 kB, as text; "" if nothing."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run_limited, args=[there, function, dict(os.environ), *arguments])
    process.start()
    there.close()
    text = here.recv()
    process.join()
    return text


def _run_limited(pipe, function, environment, *arguments):
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    pipe.send(_error_of(lambda: function(*arguments)))


def _error_of(call):
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def as_nobody(call):
    """Return what ``call`` raises, as text, in a child process without root's rights; "" if nothing.

    The child has no threads but its own: it must not use connections of this process.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        os.write(write, _error_of(call).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text
