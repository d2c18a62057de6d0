"""Scripts started from something other than a terminal, or from a terminal that closes."""

import io
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from commandline import ROOT, warm_python
from fastprogress import fastprogress
from nbclient import NotebookClient

from cifar10 import cli
from cifar10.errors import UserError

QUICK = ["--data", "digits", "--width", "2", "--epochs", "1", "--peak_epoch", "1"]


def run_cells(*cells: str, cwd) -> list[str]:
    """What each cell shows, as text: streams, results, and the last line of an error."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(cwd)}}, allow_errors=True).execute()
    return ["".join(map(shown, cell.outputs)) for cell in notebook.cells]


def shown(output) -> str:
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return output.text if output.output_type == "stream" else str(output.data)


@pytest.mark.slow
def test_the_walkthrough(tmp_path, monkeypatch):
    """Every cell runs, with a narrower model, and shows what it is about; in git it has no outputs."""
    monkeypatch.delenv("MPLBACKEND")  # of the tests
    notebook = nbformat.read(ROOT / "walkthrough.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    (settings,) = (cell for cell in code if "WIDTH = " in cell.source)
    assert 'DATA, WIDTH = "digits", 16' in settings.source
    settings.source = settings.source.replace("16", "4")
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(ROOT)}}).execute()
    pictures = sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    text = "".join(shown(output) for cell in code for output in cell.outputs)
    assert pictures >= 7 and "Total params" in text and "with test-time augmentation" in text


@pytest.mark.slow
def test_in_a_jupyter_kernel(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND")  # of the tests
    options = f"{' '.join(QUICK)} --lr_max 0.1 --runs_dir {tmp_path}"
    backend, missing, train, wrong, after, repl = run_cells(
        "import os, signal; os.environ['MPLBACKEND']",
        f"%env MPLBACKEND=module://not_installed.backend\n!{sys.executable} {ROOT}/train.py {options} --name shell",
        f"%env MPLBACKEND=module://matplotlib_inline.backend_inline\n%run {ROOT}/train.py {options} --name kernel",
        f"%run {ROOT}/train.py --epochs 0",
        "import matplotlib; from fastprogress import fastprogress\n"
        "print(matplotlib.get_backend(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, fastprogress.NO_BAR)",
        f"%cd -q {ROOT}\nfrom train import *\nlearn = get_learner(get_dls('digits'), width=2)\n"
        "learn.fit_one_cycle(1, 0.1)\nlearn.show_results()\nlearn.recorder.plot_loss()\nlearn.lr_find()",
        cwd=tmp_path,
    )
    assert "module://matplotlib_inline.backend_inline" in backend
    assert "of 360 test images of digits correct" in missing and "Traceback" not in missing
    assert "of 360 test images of digits correct" in train and "Error" not in train
    for name in ("shell", "kernel"):
        assert {"metrics.json", "curves.png", "gradcam.png", "misclassified.png"} <= {
            path.name for path in (tmp_path / name).iterdir()
        }
    assert "error: epochs is 0; it must be at least 1" in wrong and "SystemExit: 2" in wrong
    assert after.split()[0].endswith("inline") and after.split()[1:] == ["True", "False"]
    assert repl.count("image/png") == 2 and "Error" not in repl


# Run all of them in an interpreter that has imported none of fastai and matplotlib, but what else takes long.
RUN_ALL = """
import os, sys
import pandas, scipy.stats, sklearn.model_selection, torchvision
from tests.commandline import run_python
assert not {"fastai", "matplotlib", "cifar10"} & {*sys.modules}
for script in SCRIPTS:
    if not os.fork():
        run_python(script)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 2, script
"""
SCRIPTS = [  # whose mistakes are found by what is imported later
    ["train.py", "--resume", "nowhere"], ["interpret.py", "nowhere"], ["predict.py", "nowhere", "cat.jpg"],
    ["compare.py", "nowhere"], ["app.py", "nowhere"], ["-m", "benchmarks.tables", "--zzz"],
]  # fmt: skip


@pytest.mark.slow
def test_a_backend_that_is_not_installed(tmp_path):
    """Started by a notebook of another environment. Without matplotlib-inline, `import matplotlib` refuses its name."""
    hidden = "import importlib.metadata as m\nm.entry_points = lambda **_: m.EntryPoints()\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)  # as if matplotlib-inline were not installed
    command = [sys.executable, "-c", RUN_ALL.replace("SCRIPTS", repr(SCRIPTS))]
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment = {**os.environ, **backend, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: nowhere is n") == 5 and done.stderr.count("there is no option --zzz") == 1


# ---- Streams


class Window:
    """The least that `print` needs, like the output window of an editor."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def getvalue(self):
        return self.text


def fails(main) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code


@pytest.fixture
def bare(monkeypatch):
    """No arguments, and the settings of a script undone after the test."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(fastprogress, "NO_BAR", False)
    monkeypatch.setattr(fastprogress.ConsoleProgressBar, "fill", "█")


def says():
    print("hello")


def mistake():
    raise UserError("it is wrong; mend it")


@pytest.mark.parametrize("stream", [None, Window(), io.StringIO()])
def test_unusual_streams(bare, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    cli.run(says)
    assert fastprogress.NO_BAR
    assert fails(mistake) == 2
    if stream is not None:
        assert stream.getvalue() == "hello\nerror: it is wrong; mend it\n"


def start(tmp_path, *options, **streams) -> subprocess.Popen:
    command = [warm_python(), ROOT / "train.py", *QUICK, "--epochs", "500", *options, "--name", "run"]
    heed = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731 (nohup, if the tests run under it, ignores it)
    return subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True, preexec_fn=heed, **streams)


def wait_for_training(process, tmp_path):
    while not list((tmp_path / "runs/run/checkpoints").glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal(tmp_path):
    process = start(tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_training(process, tmp_path)
    process.send_signal(signal.SIGHUP)
    said = process.communicate()[1]
    assert process.returncode == 129 and "stopped by SIGHUP; resume with: " in said and "--resume runs/run" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_pipe_that_closes(tmp_path):
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while " training and " not in (line := process.stdout.readline()):
        assert line
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 141 and "stopped by a closed pipe; resume with: " in said and "Traceback" not in said


def test_nohup_keeps_its_word(bare):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        cli.run(lambda: signal.raise_signal(signal.SIGHUP))  # would end the run
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert fails(lambda: signal.raise_signal(signal.SIGHUP)) == 129
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
