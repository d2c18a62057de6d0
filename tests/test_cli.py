"""What all scripts have in common: options, errors in one sentence, exit statuses."""

import re
import signal
from typing import Annotated

import pytest
import torch

import predict
from cifar10 import cli, signals
from cifar10.cli import YesNo, parse
from cifar10.errors import Stopped, UserError
from cifar10.runs.run import Run


def example(
    folder: str,  # a folder
    batch_size: int = 3,  # a number
    flip: Annotated[bool | None, {"action": YesNo}] = None,  # yes or no
    tta: bool = False,  # a flag
    save_as: str | None = None,  # a name
):
    "An example."


@pytest.mark.parametrize("option", ["--batch_size=7", "--batch-size=7"])
def test_only_what_was_typed(option):
    assert parse(example, ["here", option, "--no-flip"]) == {"folder": "here", "batch_size": 7, "flip": False}
    assert parse(example, ["here", "--tta"]) == {"folder": "here", "tta": True}
    assert parse(example, ["a_b-c", "--batch_size", "3"]) == {"folder": "a_b-c", "batch_size": 3}


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["--", "--my_photo.jpg"], {"folder": "--my_photo.jpg"}),
        (["--batch_size=3", "--", "--batch_size"], {"folder": "--batch_size", "batch_size": 3}),
        (["--", "--debug"], {"folder": "--debug"}),
        (["--my_photo 1.jpg"], {"folder": "--my_photo 1.jpg"}),
        (["here", "--save_as", "a_b"], {"folder": "here", "save_as": "a_b"}),
        (["here", "--save_as=a_b"], {"folder": "here", "save_as": "a_b"}),
        (["here", "--save_as=--a_b"], {"folder": "here", "save_as": "--a_b"}),
        (["here", "--save_as", "--a_b c"], {"folder": "here", "save_as": "--a_b c"}),
        (["here", "--save_as=--a_b=c_d e_f"], {"folder": "here", "save_as": "--a_b=c_d e_f"}),
        (["here", "--save_as", "--", "x"], "argument --save-as: expected one argument"),
        (["here", "--save_as", "--a_b"], "argument --save-as: expected one argument"),
    ],
)
def test_values_are_kept_as_they_are(words, typed, capsys):
    """Whatever comes after a bare `--`, and the values of options, although they look like options."""
    if isinstance(typed, dict):
        assert parse(example, words) == typed
    else:
        with pytest.raises(SystemExit):
            parse(example, words)
        assert typed in capsys.readouterr().err


def test_several_values_after_two_dashes():
    """As `predict.py` takes them; a second `--` is a value."""
    typed = parse(predict.Options, ["RUN", "--topk=2", "a_b", "--", "--my_photo.jpg", "--topk=3", "--", "-"])
    assert typed == {"run": "RUN", "images": ["a_b", "--my_photo.jpg", "--topk=3", "--", "-"], "topk": 2}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["here", "--batch_sise", "3"], "there is no option --batch-sise; did you mean --batch-size?"),
        (["here", "--batch", "3"], "there is no option --batch; did you mean --batch-size?"),
        (["here", "--zzz"], "there is no option --zzz; see --help"),
        (["here", "there"], "unrecognized arguments: there; options begin with --"),
        (["here", "--batch_size", "many"], "invalid int value: 'many'"),
        ([], "the following arguments are required: folder"),
        ([""], "an argument is empty; give a value"),
        (["here", "--", ""], "an argument is empty; give a value"),
        (["here", "--save_as", ""], "--save_as is empty; give a value"),
        (["here", "--batch-size="], "--batch-size is empty; give a value"),
    ],
)
def test_a_wrong_option_gets_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(example, words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("this is wrong;\nfix it"), 2, "error: this is wrong;\\nfix it\n"),
        (PermissionError(13, "Denied", "x"), 2, "error: [Errno 13] Denied: 'x' (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "\nstopped by Ctrl-C\n"),
        (Stopped("SIGHUP", "; resume with: this"), 129, "\nstopped by SIGHUP; resume with: this\n"),
        (BrokenPipeError(), 141, "stopped by a closed pipe\n"),
        (Stopped("SIGTERM"), 143, "\nstopped by SIGTERM\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, f"error: {cli.TOO_LARGE} (--debug shows where)\n"),
    ],
)  # fmt: skip
def test_exit_statuses(error, status, says, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["script"])
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **kwargs: None, raising=False)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == status and capsys.readouterr().err == says


@pytest.mark.parametrize(("number", "by"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
@pytest.mark.parametrize(
    "next_error", [TypeError("of a value that is missing"), UserError("this is wrong"), OSError(2)]
)
def test_a_signal_that_a_library_takes_for_its_own_error(number, by, next_error, capsys, monkeypatch):
    """As fastai does in places: the rest of the work fails, and the reason is still the signal."""

    def main():
        try:
            signal.raise_signal(number)
        except:  # noqa: E722
            raise next_error from None

    monkeypatch.setattr("sys.argv", ["script"])
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **kwargs: None, raising=False)
    monkeypatch.setattr(cli, "ignore_signals", lambda: None)
    before = signal.signal(number, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number and capsys.readouterr().err == f"\nstopped by {by}\n"
    assert not signals.received


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("Connection closed by peer")])
def test_a_signal_while_the_program_is_ending_changes_nothing(error, tmp_path, capsys, monkeypatch):
    """torchrun sends one to a process that has just noticed the loss of another: it still says how to resume."""
    run = Run.__new__(Run)
    run.path = tmp_path

    def main():
        with run.lock():
            raise error

    def interrupted(function):
        return lambda *args: signal.raise_signal(signal.SIGTERM) or function(*args)

    monkeypatch.setattr("sys.argv", ["script"])
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **kwargs: None, raising=False)
    monkeypatch.setattr("cifar10.processes.is_lost", lambda reason: True)
    monkeypatch.setattr("cifar10.runs.run.is_distributed", lambda: True)
    monkeypatch.setattr(run, "resume_command", interrupted(lambda: "this"))
    monkeypatch.setattr(cli, "fail", interrupted(cli.fail))
    with pytest.raises(SystemExit):
        cli.run(main)
    assert re.fullmatch(r"\nstopped by (Ctrl-C|a lost connection to .*); resume with: this\n", capsys.readouterr().err)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # that of the tests


@pytest.mark.parametrize("error", [UserError("wrong"), OSError("gone")])
def test_debug_keeps_the_traceback(error, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["script", "--debug"])
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **kwargs: None, raising=False)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    with pytest.raises(type(error), match=str(error)):
        cli.run(main)


def test_a_value_named_debug_is_not_the_option(monkeypatch, capsys):
    def main(folder: str):
        "An example."
        raise UserError(f"{folder} is wrong")

    monkeypatch.setattr("sys.argv", ["script", "--", "--debug"])
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **kwargs: None, raising=False)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err == "error: --debug is wrong\n"


def test_a_notebook_gets_its_signal_handlers_back(monkeypatch):
    """After `%run` of a script that failed, the notebook can still be interrupted."""

    def main():
        raise UserError("wrong")

    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    monkeypatch.setattr("sys.argv", ["script"])
    with pytest.raises(SystemExit):
        cli.run(main)
    monkeypatch.setattr("sys.argv", ["script", "--zzz"])
    with pytest.raises(SystemExit):
        cli.start(example)
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
