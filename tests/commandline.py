"""Our scripts, run as from a shell, but from a process that has imported the packages already (which takes seconds)."""

import atexit
import ctypes
import fcntl
import functools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from itertools import takewhile
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["cifar10.data", "cifar10.training", "cifar10.runs", "cifar10.interpretation", "torch.distributed.launcher.api"]
)
FORK = multiprocessing.get_context("fork")
BLANK_PLOTS = {"TESTS_BLANK_PLOTS": "1"}  # in the environment of warm_python(): as `command` with `drawn=False`


class Done(NamedTuple):
    """A process that has ended; its status is negative for a signal."""

    returncode: int
    stdout: str
    stderr: str


def become(script: str, arguments: list[str], cwd: str, outputs: list[str], file_size: int | None, drawn: bool):
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    if file_size:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if not drawn:
        leave_plots_blank()
    os.chdir(cwd)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    run_python([str(ROOT / script), *arguments])


def save_blank(figure, file, **_):
    from PIL import Image

    Image.new("L", (1, 1)).save(file, "png")


def leave_plots_blank():
    """In this process, save a pixel in the place of each figure, whose layout takes most of the time of a short run."""
    from matplotlib.figure import Figure

    Figure.savefig = save_blank


def run_python(words: list[str]):
    """Run a script, `-m module` or `-c code` with its arguments, as the Python interpreter does."""
    first, *arguments = words
    if first not in ("-m", "-c"):
        sys.argv = [first, *arguments]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
        return
    sys.path.insert(0, "")
    sys.argv = [first, *arguments[1:]]
    if first == "-m":
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        exec(compile(arguments[0], "<string>", "exec"), vars(sys.modules["__main__"]) | {"__name__": "__main__"})


def command(script: str, *arguments, cwd: Path, file_size: int | None = None, drawn: bool = True) -> Done:
    """Run a script of ours in `cwd`, at most with files of `file_size` bytes; the process when it has ended.

    If not `drawn`, plots are made as usual but saved as a single pixel; see `leave_plots_blank`.
    """
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        arguments = (script, [str(a) for a in arguments], str(cwd), [out.name, err.name], file_size, drawn)
        process = SERVER.Process(target=become, args=arguments)
        process.start()
        process.join()
        return Done(process.exitcode, Path(out.name).read_text(), Path(err.name).read_text())


# ---- An executable in the place of Python, for whatever starts Python by itself


@functools.cache
def warm_python() -> str:
    """The path of a program that runs scripts, modules and code as Python does, by processes that are forked.

    It passes signals on, and ends as the forked process does, by a signal as well. If it is killed, so is the process.
    Sources: https://docs.pytorch.org/docs/stable/elastic/run.html names the environment variable PYTHON_EXEC.
    """
    folder = Path(tempfile.mkdtemp())
    client = f"{sys.executable} -IS {Path(__file__).with_name('warm.py')} {folder}/socket"
    (folder / "python").write_text(f'#!/bin/sh\nexec {client} "$0" "$@"\n')
    (folder / "python").chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/socket")
    listener.listen(64)
    server = SERVER.Process(target=serve, args=(listener,), daemon=False)
    server.start()
    listener.close()
    atexit.register(server.terminate)  # before multiprocessing waits for it
    return str(folder / "python")


def serve(listener: socket.socket):
    """Answer clients until the tests end."""
    tests = multiprocessing.parent_process().sentinel
    while tests not in wait([listener, tests]):
        connection, _ = listener.accept()
        FORK.Process(target=watch, args=(connection, listener)).start()
        connection.close()
        multiprocessing.active_children()  # waits for those that have ended


def watch(connection: socket.socket, listener: socket.socket):
    """Run what a client asks for and tell it the status; kill it if the client is gone, or the tests are."""
    listener.close()
    _, descriptors, *_ = socket.recv_fds(connection, 1, 100)
    about = json.loads(connection.makefile().readline())
    process = FORK.Process(target=become_client, args=(connection, descriptors, about))
    process.start()
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{process.pid}\n".encode())
    server = multiprocessing.parent_process().sentinel  # which ends with the tests
    if process.sentinel in wait([process.sentinel, connection, server]):
        process.join()
        connection.sendall(f"{process.exitcode}\n".encode())
    else:
        process.kill()


def become_client(connection: socket.socket, descriptors: list[int], about: dict):
    """Run Python with the client's files, folder, environment, signals and network; multiprocessing starts it alike."""
    import torch

    connection.close()
    network, *passed = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 200) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for number, descriptor in zip(about["descriptors"], passed, strict=True):
        if number > 2:
            with suppress(OSError):
                os.dup(number)  # it may be what tells multiprocessing that this process is alive
        os.dup2(descriptor, number)
        os.close(descriptor)
    if os.fstat(network).st_ino != os.stat("/proc/self/ns/net").st_ino and ctypes.CDLL(None).setns(network, 0):
        raise OSError("the process can't join the network namespace of its client")
    os.close(network)
    os.environ.clear()
    os.environ.update(about["environment"])
    os.chdir(about["cwd"])
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number in about["ignored"] else signal.SIG_DFL)
    interrupted = signal.SIG_IGN if signal.SIGINT in about["ignored"] else signal.default_int_handler
    signal.signal(signal.SIGINT, interrupted)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if BLANK_PLOTS.items() <= os.environ.items():
        leave_plots_blank()
    multiprocessing.set_executable(about["python"])
    options = list(takewhile(lambda word: word.startswith("-") and word not in ("-m", "-c"), about["words"]))
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if "-u" in options else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    run_python(about["words"][len(options) :])
