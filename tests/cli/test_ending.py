"""Signals, what an interrupted command says, and the end of the process."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from click.testing import CliRunner

from optimer_hf.cli import main
from optimer_hf.files.staging import staged_directory
from tests.support.cli import optimer, process

ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """Handle signals as a command in a terminal does; `nohup` and `&` ignore some of them."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_a_signal_cleans_up_says_how_to_resume_and_is_the_exit_status(
    tmp_path, monkeypatch, number, status
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupted(*arguments, **options):
        with TemporaryDirectory(), staged_directory(tmp_path / "out") as staging:
            (staging / "half").write_text("half")
            os.kill(os.getpid(), number)
            time.sleep(10)

    monkeypatch.setattr("optimer_hf.hub.pull", interrupted)
    monkeypatch.setattr(sys, "argv", ["optimer", "pull", "a/b"])
    with defaults():
        result = optimer("pull", "a/b", ok=False)
        ended = {signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    assert result.exit_code == status
    assert "interrupted. Finished" in result.stderr
    assert result.stderr.endswith("; to resume: optimer pull a/b\n")
    assert list(tmp_path.iterdir()) == []
    assert ended == {signal.SIG_DFL}


def test_ignored_and_handled_signals_are_left_alone(monkeypatch):
    handlers = []
    monkeypatch.setattr(
        "optimer_hf.hub.pull", lambda *_, **__: handlers.append(signal.getsignal(signal.SIGHUP))
    )
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        CliRunner().invoke(main, ["pull", "a/b"])
        assert handlers == [signal.SIG_IGN] == [signal.getsignal(signal.SIGHUP)]
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_the_process_ends_despite_waiting_threads_and_runs_exit_handlers():
    code = (
        "import atexit, sys, threading\n"
        "from optimer_hf.cli import main\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "atexit.register(print, 'tidied up')\n"
        "sys.argv = ['optimer', 'nonsense']\n"
        "main()"
    )
    result = process("-c", code)
    assert result.returncode == 2 and "No such command 'nonsense'" in result.stderr
    assert result.stdout == ""  # for results
    assert result.stderr.endswith("tidied up\n")


SECRET = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--token", SECRET], "optimer pull a/b --update, with your --token\n"),
        ([f"--token={SECRET}"], "optimer pull a/b --update, with your --token\n"),
        (["--token", "--token"], "optimer pull a/b --update, with your --token\n"),
        (["--revision", SECRET], "optimer pull a/b --revision ... --update\n"),
        (["--out", "of-the-environment"], "optimer pull a/b --out ... --update\n"),
        (["--out", "tokens"], "optimer pull a/b --out tokens --update\n"),
    ],
)
def test_no_token_is_shown_with_the_command_that_resumes(monkeypatch, given, shown):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimer_hf.hub.pull", interrupted)
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    monkeypatch.setattr(sys, "argv", ["optimer", "pull", "a/b", *given, "--update"])
    result = optimer("pull", "a/b", ok=False)
    assert result.exit_code == 130
    assert result.stderr.endswith(f"to resume: {shown}")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_error(closed):
    command = f"{shlex.quote(sys.executable)} -m optimer_hf schema study {closed}"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr
    assert ended.stdout.startswith("{") == (closed == "2>&-")


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command", ["--help", "--version", "schema --help", "schema study", "cache", "validate o.yaml"]
)
def test_a_full_stdout_is_one_line(command, unbuffered, tmp_path):
    (tmp_path / "o.yaml").write_text("terms: [{text: o.yaml}]")
    settings = {"PYTHONUNBUFFERED": unbuffered, "OPTIMER_CACHE": str(tmp_path)}
    with FULL.open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "optimer_hf", *command.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | settings,
        )
    assert ended.stderr.startswith("error: stdout: No space left on device. Free space there")
    assert ended.stderr.count("\n") == 1 and ended.returncode == 1


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_results_that_are_lost_in_the_end_are_named():
    code = "import sys; from optimer_hf.cli.stdout import separate_from_descriptor; "
    code += "from optimer_hf.cli.ending import leave; separate_from_descriptor(); "
    code += "print('held back'); leave(0)"
    with FULL.open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
        )
    assert ended.stderr.startswith("error: stdout: No space left on device")
    assert ended.returncode == 120


def test_a_reader_that_has_enough_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m optimer_hf schema study | head -c 9"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert not ended.stderr and len(ended.stdout) == 9
