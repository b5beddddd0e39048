"""Kill a command at every change of the file system, start it again, and compare the result with
that of an uninterrupted run.

Run as a process of its own: `python kills.py SCRATCH`, requests as JSON lines on stdin, answers as
JSON lines on stdout. It imports what the commands import, once, and forks a child for every try, so
that a kill costs a fraction of a second. A child counts its changes to the files below SCRATCH
(opening to write, renaming, making, removing, syncing; for writers in Rust and C++, the calls). It
kills itself with SIGKILL right before the event in the request.
"""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {  # audit events -> which of their arguments are paths, and directories they are in
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.truncate": ((0, None),),
}
OUTSIDE_PYTHON = (  # writers that no audit event sees: module, function
    ("safetensors.torch", "serialize_file"),
    ("safetensors.torch", "save_file"),
    ("transformers.modeling_utils", "safe_save_file"),
    ("peft.peft_model", "safe_save_file"),
    ("torch", "save"),
)
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # of a disk that refuses data
SECONDS = 300  # a child that takes longer hangs
# differs from run to run: durations, memory, and when a file was written
TIMED = [
    re.compile(r'title="[^"]*cpu [\d.]+" data-value="[\d.e-]+">[\d.]+'),  # in a table of trials
    re.compile(r"\bseconds\": \{[^}]*\}"),  # of a trial
    re.compile(
        r"\b(?:seconds|cpu_seconds|ask|merge|forward|backward|harness|overhead_share|tokens_per_second"
        r"|peak_bytes|\w+_runtime|\w+_per_second)\"?:? ?[-+\d.,e]*\d"
    ),
    re.compile(r"[\d.]+ (?:s|min|h)(?: \d+ (?:s|min))? in all, \d+ % of it for [^\"<]*"),
    re.compile(r"\bafter [\d.]+ minutes\b"),
    re.compile(r"\btraining the vectors: [\d.]+ s[^\"<]*"),
    re.compile(r"## Ledger\n.*?(?=\nBeside|\Z)", re.DOTALL),
    re.compile(r'<figure id="(?:progress|ledger)".*?</figure>', re.DOTALL),
    re.compile(r"\b\d{19}\b"),  # nanoseconds
]
DRAWN_TIMES = tuple(
    f"figures/{name}{ending}.png" for name in ("progress", "ledger") for ending in ("", "-dark")
)


@dataclass(frozen=True)
class Outcome:
    """How a child ended: exit status (negative: a signal), its changes to files, its output."""

    status: int
    events: list[str]
    said: str


class Driver:
    """Tries commands in one working directory below `scratch`, which is always the same path."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.work = scratch, scratch / "work"
        self.repo: str | None = None  # the repository that a push makes; removed before every try
        self._references: dict[str, tuple[Outcome, dict[str, str]]] = {}

    def reference(
        self, start: str, arguments: Sequence[str], result: str, ignored: str
    ) -> tuple[Outcome, dict[str, str]]:
        """Run a command uninterrupted from a state, only once, and keep its files as `result`.

        Returns how it ended, and file -> digest.
        """
        if result not in self._references:
            outcome = self._run_uninterrupted(start, arguments, result)
            self._references[result] = outcome, self.read_files(ignored)
        return self._references[result]

    def _run_uninterrupted(self, start: str, arguments: Sequence[str], result: str) -> Outcome:
        self._restore(start)
        _import_known_modules(self.scratch / "modules.json")
        outcome = self._child(arguments)
        _import_known_modules(self.scratch / "modules.json")
        if outcome.status == 0:
            shutil.rmtree(self.scratch / result, ignore_errors=True)
            shutil.copytree(self.work, self.scratch / result, symlinks=True)
        return outcome

    def run_again(self, arguments: Sequence[str]) -> Outcome:
        """Run a command on the files as they are."""
        return self._child(arguments)

    def run_and_kill(self, start: str, arguments: Sequence[str], number: int) -> Outcome:
        """Run a command and kill it right before an event."""
        self._restore(start)
        return self._child(arguments, kill_at=number)

    def run_and_refuse(
        self, start: str, arguments: Sequence[str], number: int, error: int
    ) -> Outcome:
        """Run a command on a disk that refuses data from an event on."""
        self._restore(start)
        return self._child(arguments, kill_at=number, error=error)

    def read_files(self, ignored: str) -> dict[str, str]:
        """Return file -> digest of the files that are here and on the Hub."""
        there = {} if self.repo is None else repository_files(self.repo)
        return contents(self.work, ignored) | there

    def _restore(self, state: str) -> None:
        for path in (self.work, self.scratch / "tmp"):
            shutil.rmtree(path, ignore_errors=True)
        (self.scratch / "tmp").mkdir()
        if self.repo is not None:
            remove_repository(self.repo)
        shutil.copytree(self.scratch / state, self.work, symlinks=True)

    def _child(
        self, arguments: Sequence[str], kill_at: int | None = None, error: int | None = None
    ) -> Outcome:
        said, events = self.scratch / "said.txt", self.scratch / "events.txt"
        for path in (said, events):
            path.write_text("")
        child = os.fork()
        if child == 0:
            modules = self.scratch / "modules.json"
            _be_child(self.work, arguments, said, events, kill_at, modules, error)
        deadline, status = time.monotonic() + SECONDS, None
        while status is None and time.monotonic() < deadline:
            ended, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
            time.sleep(0.01)
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = -999
        return Outcome(status, events.read_text().splitlines(), said.read_text())


def _import_known_modules(names: Path) -> None:
    """Import the modules that earlier children imported, so that later ones need not."""
    for name in json.loads(names.read_text()) if names.exists() else ():
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # an optional part of a library
                continue
    assert threading.active_count() == 1, threading.enumerate()


def _be_child(
    work: Path,
    arguments: Sequence[str],
    said: Path,
    events: Path,
    kill_at: int | None,
    modules: Path,
    error: int | None,
) -> None:
    """Run the command in this process, which is a fork, and end it."""
    status = 70
    try:
        os.setsid()
        os.chdir(work)
        with open(said, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        log = os.open(events, os.O_WRONLY | os.O_APPEND)
        _count_events(str(work), log, kill_at, error)
        sys.argv = ["optimer", *arguments]
        from optimer_hf.cli import main

        main(list(arguments))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if kill_at is None:
            known = json.loads(modules.read_text()) if modules.exists() else []
            modules.write_text(json.dumps(sorted({*known, *sys.modules} - {"__main__"})))
        os._exit(status)


def _count_events(work: str, log: int, kill_at: int | None, error: int | None) -> None:
    """Note every change below `work` in the file `log`, and kill right before number `kill_at`.

    With an errno, refuse everything that takes space from that event on instead.
    """
    lock, count = threading.Lock(), 0
    seen = threading.local()

    def note(what: str) -> None:
        nonlocal count
        with lock:
            count += 1
            if count == kill_at and error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            takes_room = not what.startswith(("os.remove", "os.rmdir", "after", "before os.fsync"))
            if error is not None and kill_at is not None and count >= kill_at and takes_room:
                raise OSError(error, os.strerror(error), what.split(" ")[1])
            os.write(log, f"{what}\n".encode(errors="replace"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(seen, "busy", False) or (event != "open" and event not in CHANGES):
            return
        seen.busy = True
        try:
            if event == "open":
                path, _, flags = arguments
                if isinstance(path, int) or not flags & WRITING:
                    return
                paths = [_absolute(path, None)]
            else:
                paths = [
                    _absolute(arguments[at], arguments[folder] if folder is not None else None)
                    for at, folder in CHANGES[event]
                ]
            if any(path.startswith(f"{work}/") for path in paths):
                note(f"{event} {' '.join(path.removeprefix(work) for path in paths)}")
        finally:
            seen.busy = False

    def count_calls(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            note(f"before {name}")
            result = function(*args, **options)
            note(f"after {name}")
            return result

        return call

    for module, name in OUTSIDE_PYTHON:
        if module in sys.modules and hasattr(sys.modules[module], name):
            function = getattr(sys.modules[module], name)
            setattr(sys.modules[module], name, count_calls(f"{module}.{name}", function))
    os.fsync = count_calls("os.fsync", os.fsync)
    sys.addaudithook(hook)


def _absolute(path: Any, folder: int | None) -> str:
    text = os.fsdecode(path) if not isinstance(path, int) else f"/proc/self/fd/{path}"
    if folder is not None and folder >= 0:
        text = str(Path(f"/proc/self/fd/{folder}").readlink() / text)
    return os.path.abspath(text)  # noqa: PTH100 - a link that is removed is not what it names


# -- the repository of a push ----------------------------------------------------------------------


def remove_repository(repo: str) -> None:
    """Remove a repository from the local Hub, if it is there."""
    owner, _, name = repo.partition("/")
    with contextlib.suppress(urllib.error.HTTPError):
        _request("/api/repos/delete", "DELETE", {"organization": owner, "name": name})


def repository_files(repo: str) -> dict[str, str]:
    """Return file -> digest for a repository on the local Hub."""
    files = _request(f"/api/models/{repo}/tree/main?recursive=true")
    return {
        f"hub:{file['path']}": file.get("lfs", {}).get("oid", file["oid"])
        for file in files
        if file["type"] == "file"
    }


def _request(path: str, method: str = "GET", body: Any = None) -> Any:
    request = urllib.request.Request(
        os.environ["HF_ENDPOINT"] + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "authorization": f"Bearer {os.environ['HF_TOKEN']}",
            "content-type": "application/json",
        },
    )
    with urllib.request.urlopen(request) as answer:
        return None if method == "DELETE" else json.loads(answer.read())


# -- comparing -------------------------------------------------------------------------------------


def contents(folder: Path, ignored: str) -> dict[str, str]:
    """Return file -> sha256 without times, for files that do not match `ignored`."""
    return dict(_digests(folder, re.compile(ignored)))


def _digests(folder: Path, ignored: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not ignored.search(name):
            data = path.read_bytes()
            if path.suffix in (".json", ".jsonl", ".yaml", ".yml", ".md", ".html"):
                data = drop_times(data.decode()).encode()
            if name.endswith(DRAWN_TIMES):
                data = b""
            yield name, hashlib.sha256(data).hexdigest()


def drop_times(text: str) -> str:
    """Replace the times in a text."""
    for pattern in TIMED:
        text = pattern.sub("TIME", text)
    return text


def list_differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Return one line for each file that differs, is missing or is too many."""
    wrong = []
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            is_there = "too many" if name not in expected else "differs"
            wrong.append(f"{name}: {is_there if name in found else 'missing'}")
    return wrong


def _refusal_faults(
    driver: Driver,
    outcome: Outcome,
    error: int,
    states: tuple[Mapping[str, str], Mapping[str, str]],
    request: Mapping[str, Any],
) -> list[str]:
    """Return what a command did wrong when the disk refused its data.

    It should report the error in one line, or do without optional files. Every file should be the
    old one or the new one, and no other file should be there.
    """
    work, result = driver.work, driver.scratch / request["result"]
    (before, after), left = states, driver.read_files(request["ignored"])
    optional, resumed = re.compile(request["optional"]), re.compile(request["resumed"])
    wrong = []
    errors = [line for line in outcome.said.splitlines() if line.startswith("error: ")]
    is_said = len(errors) == 1 and os.strerror(error) in errors[0]
    if outcome.status == 0:
        missing = [name for name in list_differences(left, after) if not optional.search(name)]
        wrong += [f"exit 0 without {name}" for name in missing]
    elif outcome.status != 1 or not is_said or "Traceback" in outcome.said:
        wrong.append("not said")
    for name, digest in left.items():
        if ".partial-" in name:
            wrong.append(f"left behind: {name}")
        elif digest not in (before.get(name), after.get(name)) and not (
            resumed.search(name) and _is_beginning(work / name, result / name)
        ):
            wrong.append(f"half-written: {name}")
    for name in before.keys() & after.keys() - left.keys():
        wrong.append(f"lost: {name}")
    return wrong


def _is_beginning(file: Path, whole: Path) -> bool:
    """Whether a log contains only the first lines of another; true for other files."""
    if file.suffix != ".jsonl" or not whole.exists():
        return True
    written, expected = (drop_times(each.read_text()).splitlines() for each in (file, whole))
    return written == expected[: len(written)]


def try_events(driver: Driver, request: Mapping[str, Any]) -> dict[str, Any]:
    """Kill one command at the requested events; return the number of tries and the failures."""
    start, arguments, ignored = request["start"], request["arguments"], request["ignored"]
    driver.repo = request.get("repo")
    whole, expected = driver.reference(start, arguments, request["result"], ignored)
    if whole.status != 0:
        return {"n_events": 0, "tried": 0, "failed": [f"uninterrupted: {whole.said}"]}
    before = contents(driver.scratch / start, ignored)
    numbers = _choose_events(len(whole.events), request)
    failed = []
    for number in numbers:
        error, event = ERRORS[number % len(ERRORS)], whole.events[number - 1]
        wrong: list[str] = []
        if request["is_refused"]:
            first = last = driver.run_and_refuse(start, arguments, number, error)
            wrong = _refusal_faults(driver, first, error, (before, expected), request)
        else:
            first = last = driver.run_and_kill(start, arguments, number)
        if request["is_refused"] or first.status == -signal.SIGKILL:
            last = driver.run_again(arguments)
        differences = list_differences(driver.read_files(ignored), expected)
        ended = last.status == 0 or re.search(request["accepted"], last.said) is not None
        if not ended or differences:
            failed.append(
                f"{number} ({event}): again: exit {last.status}, {differences}, {_last_lines(last)}"
            )
        if wrong:
            how = f"exit {first.status}, {wrong}, {_last_lines(first)}"
            failed.append(f"{number} ({event}): {os.strerror(error)}: {how}")
        told = f"{request['name']} {number}/{len(whole.events)}: {len(failed)} failed\n"
        sys.stderr.write(told)
        sys.stderr.flush()
    return {"n_events": len(whole.events), "tried": len(numbers), "failed": failed}


def _choose_events(n_events: int, request: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the events to try: all, or a sample."""
    numbers = list(range(1, n_events + 1))
    if request["sample"] is None:
        return numbers
    n_chosen = min(request["sample"], n_events)
    return sorted(random.Random(request["seed"]).sample(numbers, n_chosen))


def _last_lines(outcome: Outcome) -> str:
    return " | ".join(outcome.said.strip().splitlines()[-4:])


def main() -> None:
    """Answer requests until stdin ends."""
    import torch

    torch.set_num_threads(1)
    driver = Driver(Path(sys.argv[1]))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(try_events(driver, json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
