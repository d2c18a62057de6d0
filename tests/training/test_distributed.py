"""Several processes: the same numbers as one, and what happens when one of them is lost."""

import itertools
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from commandline import BLANK_PLOTS, ROOT, command, warm_python
from filelock import FileLock

import train
from cifar10 import cli
from cifar10.errors import UserError
from cifar10.options import Options
from cifar10.processes import NEEDED, is_lost, process_group

OPTIONS = ["--data", "digits", "--width", 4, "--epochs", 3, "--peak_epoch", 1, "--lr_max", 0.1, "--precision", "fp32"]
OPTIONS += ["--name", "run", "--timeout", 900]
LOST = "stopped by a lost connection to another process"


def torchrun(
    script: str | Path,
    *arguments,
    cwd: Path,
    processes=2,
    launcher=("--standalone",),
    before=(),
    python=None,
    **variables,
):
    """Run a script of ours in several processes, with blank plots if warm; stderr goes to stdout."""
    python = python or warm_python()
    run = [*before, python, "-m", "torch.distributed.run", *launcher, "--nproc_per_node", processes]
    command = [str(word) for word in (*run, ROOT / script, *arguments)]
    about = os.environ | BLANK_PLOTS | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": python} | variables
    return subprocess.Popen(command, cwd=cwd, env=about, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    """What a process printed, once it has ended."""
    return process.communicate(timeout=900)[0]  # a busy machine may take minutes


def once(tmp_path_factory, name: str, make) -> Path:
    """A folder that `make` fills, for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    # Without workers, the folder above is that of all of pytest's sessions, and holds what an older version has found.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory, digits) -> dict[int, list[dict]]:
    """What each of one, two and three processes finds."""

    def make(folder: Path):
        for number in (1, 2, 3):
            process = torchrun("tests/parts.py", folder, cwd=folder, processes=number)
            output = finish(process)
            assert process.returncode == 0, output

    folder = once(tmp_path_factory, "parts", make)
    return {n: [torch.load(folder / f"{n}-{rank}.pt", weights_only=False) for rank in range(n)] for n in (1, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", (2, 3))
@pytest.mark.parametrize("norm", ("layer", "batch"))
def test_several_processes_train_as_one(found, norm, processes):
    alone, *them = (part[norm] for part in found[1] + found[processes])
    for part in them:
        # With batch normalization, other rounding breaks ties between the equal pixels of a digit's background
        # in another way; see the next test.
        assert part["losses"][:5] == pytest.approx(alone["losses"][:5], abs=1e-5 if norm == "layer" else 0.01)
        gradient, other = (torch.cat([*map(torch.flatten, found["gradients"].values())]) for found in (alone, part))
        assert (other - gradient).norm() <= (1e-4 if norm == "layer" else 0.05) * gradient.norm()
        assert part["flop"] == alone["flop"]
        assert part["extra"][0] == pytest.approx(alone["extra"][0], abs=0.01)  # accuracy on the training images
        assert part["values"][0] == pytest.approx(alone["values"][0], abs=0.03)
        assert all(map(torch.equal, part["state"].values(), them[0]["state"].values()))
    for name, buffer in alone["state"].items():
        assert torch.allclose(them[0]["state"][name].float(), buffer.float(), rtol=0.1, atol=0.1), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", (2, 3))
def test_batch_normalization_is_over_all_processes(found, processes):
    expected = found[1][0]["batch norm"]
    for part in found[processes]:
        assert (part["batch norm"] - expected).norm() <= 1e-10 * expected.norm()
        torch.testing.assert_close(part["statistics"], found[1][0]["statistics"], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", (2, 3))
@pytest.mark.parametrize("kind", ("trained", "validated"))
def test_each_image_is_seen_once(found, kind, processes):
    alone, *split = (part["layer"][kind] for part in found[1] + found[processes])
    whole = [image for batch in alone for image in batch]
    assert len(whole) == (2 * 4 * 359 if kind == "trained" else 2 * 360)
    assert sorted(image for part in split for batch in part for image in batch) == sorted(whole)
    if kind == "trained":
        for batch, *shares in zip(alone, *split, strict=True):
            assert sorted(itertools.chain(*shares)) == sorted(batch)
    else:
        assert len({len(part) for part in split}) == 2  # the last image is seen by one process only


@pytest.mark.slow
def test_rank_0_of_a_host_comes_first_in_every_block(found):
    """And in a second group of the same processes; none is left when its block ends."""
    for processes in (2, 3):
        for part in found[processes]:
            assert part["blocks"] == ["0", "1", "2"] and part["groups"] == 3 and part["left"]


@pytest.mark.slow
def test_whole_batches_are_augmented_after_the_training(found):
    assert {part["layer"]["augmented"] for parts in found.values() for part in parts} == {5}


@pytest.mark.slow
def test_two_processes_become_as_accurate_as_one(found):
    one, two = (found[number][0]["accuracies"] for number in (1, 2))
    assert statistics.mean(two) == pytest.approx(statistics.mean(one), abs=0.03)
    assert min(two) > 0.9  # 0.964 and more with each of 10 seeds, in one process and in two


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits) -> Path:
    """The folder of a run by two processes that nothing has interrupted, and that are interpreters of their own."""

    def make(folder: Path):
        output = finish(torchrun("train.py", *OPTIONS, cwd=folder, python=sys.executable))
        # The first and the last line: only rank 0 prints.
        assert output.count("digits: ") == output.count(" test images of digits correct") == 1, output

    return once(tmp_path_factory, "whole", make) / "runs" / "run"


@pytest.mark.slow
def test_killed_processes_are_started_again_and_the_run_resumes(whole, tmp_path):
    """One is killed in training, in validation, and while it saves a checkpoint."""
    process = torchrun("tests/killed.py", *OPTIONS, cwd=tmp_path, launcher=("--standalone", "--max-restarts", 3))
    output = finish(process)
    assert process.returncode == 0, output
    # The other process notices it first, or torchrun does, which stops it by a signal.
    assert len(re.findall(rf"({LOST}|stopped by SIGTERM); resume with: ", output)) == 3, output
    assert re.findall("Resuming after epoch (.) of 3", output) == ["0", "1", "1"], output
    run = tmp_path / "runs/run"
    assert '"processes": 2' in (run / "config.json").read_text()
    for name in ("model.safetensors", "batches.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert not list(run.rglob("*.part"))


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_another_number_can_resume(digits, tmp_path):
    process = torchrun("tests/killed.py", *OPTIONS, cwd=tmp_path)
    output = finish(process)
    assert process.returncode and output.count("; resume with: torchrun --standalone --nproc_per_node 2 ") == 1, output
    done = command("train.py", "--resume", "last", cwd=tmp_path, drawn=False)
    assert done.returncode == 0, done.stderr
    said = "Started with 2 and resumed with 1 processes: the result is the same only up to rounding"
    assert said in done.stdout, done.stdout


@pytest.mark.parametrize("words, answer", [
    (["--lr-mx", 1], "train.py: error: there is no option --lr-mx; did you mean --lr-max?"),
    (["--data", "nowhere"], "error: there is no nowhere; "),
])  # fmt: skip
def test_a_mistake_is_told_once(tmp_path, digits, words, answer):
    output = finish(torchrun("train.py", *words, cwd=tmp_path))
    assert output.count(answer) == 1, output
    assert output.count("error: ") - output.count("RuntimeError: ") == 1, output


@pytest.mark.parametrize("words, answer", [
    (["--data", "nowhere"], "error: there is no nowhere; "),
    (["--l1", 0.1], "error: an option or the precision of process 1 differs from that of rank 0; "),
])  # fmt: skip
def test_a_mistake_on_one_host_ends_all(tmp_path, digits, words, answer):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, options in enumerate(([], words)):
        launcher = ("--nnodes", 2, "--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port)
        waits = ["--timeout", 3600]  # for a lost process, which the test would not wait for
        started.append(torchrun("train.py", *OPTIONS, *waits, *options, cwd=tmp_path, processes=1, launcher=launcher))
    outputs = [finish(process) for process in started]
    assert "".join(outputs).count(answer) == 1, outputs
    assert all(process.returncode for process in started)


def test_signals_do_not_stop_a_process_that_is_about_to_say_what_is_wrong(tmp_path):
    """torchrun sends them as soon as another process has ended, and a Ctrl-C comes twice."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, signal
from cifar10 import cli, processes
from cifar10.errors import UserError

def interrupted():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    return is_first_to_fail()

def main():
    with processes.process_group("cpu", timeout=60):
        raise UserError("this is wrong")

is_first_to_fail = processes.is_first_to_fail
processes.is_first_to_fail = cli.is_first_to_fail = interrupted
cli.run(main, {})
""")
    output = finish(torchrun(script, cwd=tmp_path, PYTHONPATH=str(ROOT)))
    assert output.count("error: this is wrong\n") == 1 and "stopped by" not in output, output
    assert "KeyboardInterrupt" not in output, output


@pytest.mark.slow
def test_a_restart_does_not_resume_the_run_of_another_launch(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "runs/run")
    launcher = ("--standalone", "--max-restarts", 1)
    process = torchrun("train.py", *OPTIONS, cwd=tmp_path, processes=1, launcher=launcher)
    output = finish(process)
    assert process.returncode and output.count("error: runs/run exists already; ") == 2, output


@pytest.mark.parametrize("gpus, apple, answer", [
    (1, False, "there are 2 processes and 1 GPU; start one for each GPU"),
    (0, True, "several processes can't share an Apple GPU"),
])  # fmt: skip
def test_processes_without_a_gpu_of_their_own_are_refused(monkeypatch, gpus, apple, answer):
    for name in ("WORLD_SIZE", *NEEDED):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    with pytest.raises(UserError, match=answer), process_group("auto", timeout=5):
        pass


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch, device):
    for name in ("WORLD_SIZE", *set(NEEDED) - {"MASTER_ADDR", "LOCAL_RANK"}):
        monkeypatch.setenv(name, "2")
    answer = "WORLD_SIZE is set, but not LOCAL_RANK, MASTER_ADDR; start the processes with torchrun, or unset it"
    with pytest.raises(UserError, match=answer), process_group(device, timeout=5):
        pass


@pytest.mark.parametrize("error, lost", [
    (torch.distributed.DistNetworkError("the client socket has timed out"), True),
    (torch.distributed.DistBackendError("NCCL error"), True),
    (torch.distributed.DistStoreError("wait timeout"), True),
    (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
    (RuntimeError("the connection to the tracker timed out"), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
])  # fmt: skip
def test_what_counts_as_a_lost_process(monkeypatch, error, lost):
    assert not is_lost(error)  # of a single process
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_lost(error) == lost


@pytest.mark.parametrize("rank, local_rank, told", [(0, 0, True), (1, 1, False), (2, 0, True), (3, 1, False)])
@pytest.mark.parametrize("words, answer", [
    (["--zzz"], "train.py: error: there is no option --zzz; see --help"),
    (["--epochs", "0"], "error: epochs is 0; it must be at least 1 and at most 99999"),
    (["--device", "cuda"], "error: there are 2 processes and 1 GPU; start one for each GPU"),
])  # fmt: skip
def test_before_the_hosts_have_joined_each_says_what_is_wrong(
    monkeypatch, capsys, rank, local_rank, told, words, answer
):
    about = dict(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2, MASTER_ADDR="", MASTER_PORT=0)
    for name, value in about.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **_: None, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the first process of a host has had the time to print
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main, cli.start(Options, distributed=True))
    assert ended.value.code == 2 and capsys.readouterr().err == f"{answer}\n" * told


def test_other_scripts_run_in_one_process(tmp_path):
    output = finish(torchrun("predict.py", "nowhere", "cat.jpg", cwd=tmp_path))
    assert output.count("predict.py runs in one process: the others end") == 1, output
    assert output.count("error: ") == 1, output


@pytest.fixture
def hosts():
    """Two network namespaces that are connected as hosts: their names, devices and addresses."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root, and ip of iproute2")
    key = uuid4().hex[:6]
    names, addresses = [f"a{key}", f"b{key}"], ["10.66.0.1", "10.66.0.2"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        link = ["ip", "link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1]]
        subprocess.run(link, check=True, capture_output=True)
        for name, address in zip(names, addresses):
            for words in (
                ["addr", "add", f"{address}/24", "dev", name],
                ["link", "set", name, "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run(["ip", "-n", name, *words], check=True, capture_output=True)
        yield names
    except subprocess.CalledProcessError as reason:
        pytest.skip(f"network namespaces are not permitted: {reason.stderr}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_on(hosts, folder: Path, *options) -> list[subprocess.Popen]:
    """Start a training run on two hosts that share no folder."""
    started = []
    for rank, host in enumerate(hosts):
        (folder / host).mkdir()
        launcher = ("--nnodes", 2, "--node_rank", rank, "--master_addr", "10.66.0.1", "--master_port", 29511)
        home = dict(FASTAI_HOME=str(folder / host / "home"), GLOO_SOCKET_IFNAME=host)
        enter = ("ip", "netns", "exec", host)
        started.append(torchrun("train.py", *OPTIONS, *options, cwd=folder / host, processes=1, launcher=launcher,
                                before=enter, **home))  # fmt: skip
    return started


@pytest.mark.slow
def test_two_hosts_train_as_two_processes_of_one(hosts, whole, tmp_path):
    outputs = [finish(process) for process in start_on(hosts, tmp_path)]
    first, second = (tmp_path / host / "runs/run" for host in hosts)
    assert (first / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes(), outputs
    assert not second.exists()  # only rank 0 writes


@pytest.mark.slow
def test_hosts_that_lose_each_other_end_after_the_timeout(hosts, tmp_path):
    processes = start_on(hosts, tmp_path, "--timeout", 30, "--epochs", 999, "--peak_epoch", 1)
    saved = tmp_path / hosts[0] / "runs/run/checkpoints/epoch-00001.safetensors"
    while not saved.exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    subprocess.run(["ip", "-n", hosts[0], "link", "set", hosts[0], "down"], check=True)
    for process in processes:
        output = finish(process)
        assert re.search(f"{LOST}; resume with: the same command on each host, with --resume", output), output
