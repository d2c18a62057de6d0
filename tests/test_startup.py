"""A mistake on the command line is answered at once: before anything is imported that takes seconds."""

import os
import subprocess
import sys

import pytest
from commandline import ROOT

SLOW = {"torch", "torchvision", "fastai", "matplotlib", "pandas", "numpy", "sklearn", "scipy", "fastprogress", "PIL"}
SCRIPTS = ("train.py", "predict.py", "interpret.py", "export.py", "app.py", "compare.py")
ARGUMENTS = {  # what makes a correct command line of a script
    "train.py": [], "predict.py": ["RUN", "cat.jpg"], "interpret.py": ["RUN"], "export.py": ["RUN", "--onnx", "x.onnx"],
    "app.py": ["RUN"], "compare.py": ["RUN"],
}  # fmt: skip


def run(script: str, *words: str, **environment: str) -> tuple[int, str, list[str], set[str]]:
    """Exit status, standard output, lines of standard error, and the packages of `SLOW` that were imported."""
    command = [sys.executable, "-X", "importtime", ROOT / script, *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "argparse" in imported
    said = [line for line in lines if not line.startswith("import time:")]
    return done.returncode, done.stdout, said, imported & SLOW


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    status, out, said, slow = run(script, "--help")
    assert status == 0 and out.startswith(f"usage: {script}") and not said and not slow
    assert "--debug" in out and all(len(line.split("  ")) > 1 for line in out.splitlines() if line.startswith("  --"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_option_that_does_not_exist(script):
    status, out, said, slow = run(script, *ARGUMENTS[script], "--debugg")
    assert (status, out, said) == (2, "", [f"{script}: error: there is no option --debugg; did you mean --debug?"])
    assert not slow


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train.py --batch_size many", "train.py: error: argument --batch-size: invalid number: 'many'"),
        ("train.py --norm group", "train.py: error: argument --norm: invalid choice: 'group'"),
        ("train.py --epochs", "train.py: error: argument --epochs: expected one argument"),
        ("train.py --epochs 0", "error: epochs is 0; it must be at least 1 and at most 99999"),
        ("train.py --epochs 3 --peak_epoch 5", "error: peak_epoch is 5; it must be at most epochs, 3"),
        ("train.py --recipe fast --peak_epoch 9", "error: peak_epoch is 9; it must be at most epochs, 8"),
        ("train.py --name a/b", "error: name is 'a/b'; it must be a plain folder name"),
        ("predict.py RUN", "predict.py: error: the following arguments are required: images"),
        ("predict.py RUN cat.jpg --topk 0", "error: topk is 0; it must be at least 1"),
        ("predict.py RUN cat.jpg --csv nowhere/x.csv", "predict.py: error: argument --csv: nowhere/x.csv can't be"),
        ("interpret.py", "interpret.py: error: the following arguments are required: run"),
        ("export.py RUN", "error: there is nothing to do; give --onnx, --torch or --web"),
        ("export.py RUN --web docs", "export.py: error: argument --web: docs is not an empty folder; choose another"),
        ("export.py RUN --web nowhere/page", "export.py: error: argument --web: nowhere/page can't be written"),
        ("export.py RUN --onnx x --runtime y", "error: --runtime is for the page of --web; add --web, or leave it out"),
        ("app.py", "app.py: error: the following arguments are required: run"),
        ("app.py RUN --port 99999", "error: port is 99999; it must be from 1 to 65535"),
        ("compare.py", "compare.py: error: the following arguments are required: runs"),
    ],
)
def test_what_the_options_alone_tell(words, says):
    status, out, (line,), slow = run(*words.split())
    assert status == 2 and line.startswith(says) and not out and not slow


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_the_environment(script):
    code = f"import runpy, sys; sys.modules['fastcore'] = None; runpy.run_path({script!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: fastcore is not installed; activate the environment first: source .venv/bin")


def test_debug_shows_where():
    status, _, said, slow = run("train.py", "--epochs", "0", "--debug")
    assert status == 1 and said[0].startswith("Traceback") and said[-1].startswith("cifar10.errors.UserError: epochs")
    assert not slow


def test_under_torchrun_the_other_processes_of_a_script_end():
    assert run("predict.py", "RUN", WORLD_SIZE="2", RANK="1", LOCAL_RANK="1") == (0, "", [], set())
    _, _, said, slow = run("predict.py", "RUN", WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert said[0] == "predict.py runs in one process: the others end" and len(said) == 2 and not slow


@pytest.mark.slow
def test_what_is_imported_for_work_is_noticed():
    status, _, (line,), slow = run("predict.py", "nowhere", "cat.jpg")
    assert status == 2 and line.startswith("error: nowhere is neither the folder of a finished run")
    assert {"torch", "fastai", "matplotlib", "pandas"} <= slow
