"""Our scripts, run as from a shell, but from a process that has imported the packages already (which takes seconds)."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["cifar10.data", "cifar10.training", "cifar10.runs", "cifar10.interpretation"])


class Done(NamedTuple):
    """A process that has ended; its status is negative for a signal."""

    returncode: int
    stdout: str
    stderr: str


def become(script: str, arguments: list[str], cwd: str, outputs: list[str], file_size: int | None):
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    if file_size:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.chdir(cwd)
    sys.argv = [str(ROOT / script), *arguments]
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.path.insert(0, str(ROOT))
    runpy.run_path(sys.argv[0], run_name="__main__")


def command(script: str, *arguments, cwd: Path, file_size: int | None = None) -> Done:
    """Run a script of ours in `cwd`, at most with files of `file_size` bytes; the process when it has ended."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        arguments = (script, [str(a) for a in arguments], str(cwd), [out.name, err.name], file_size)
        process = SERVER.Process(target=become, args=arguments)
        process.start()
        process.join()
        return Done(process.exitcode, Path(out.name).read_text(), Path(err.name).read_text())
