"""A command killed at every event of the file system, started again, and compared with a run that
nobody interrupted.

Run as a process of its own: `python kills.py SCRATCH`, requests as JSON lines on stdin, answers as
JSON lines on stdout. It imports what the commands import, once, and forks a child for every try, so
that a kill costs a fraction of a second. A child counts what it does to the files below SCRATCH
(opening to write, renaming, making, removing, syncing; of writers in Rust and C++ the calls), and
kills itself with SIGKILL right before the event it was told.
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
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # of a disk that takes no data
SECONDS = 300  # a child that takes longer hangs
# what may differ from run to run: how long it took, in what memory, and when a file was written
TIMED = [
    re.compile(r"\bseconds\": \{[^}]*\}"),  # of a trial
    re.compile(
        r"\b(?:seconds|cpu_seconds|ask|merge|forward|harness|overhead_share|tokens_per_second"
        r"|peak_bytes|\w+_runtime|\w+_per_second)\"?:? ?[-+\d.,e]*\d"
    ),
    re.compile(r"\d+ % of [\d.]+ min went into [^\"<]*"),
    re.compile(r'<figure id="(?:progress|ledger)".*?</figure>', re.DOTALL),
    re.compile(r"\b\d{19}\b"),  # nanoseconds
]
DRAWN_TIMES = ("figures/progress.png", "figures/ledger.png")


@dataclass(frozen=True)
class Outcome:
    """How a child ended: exit status (negative: the signal), what it did to files, what it said."""

    status: int
    events: list[str]
    said: str


class Driver:
    """Tries commands in one working directory below `scratch`, which is always the same path."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.work = scratch, scratch / "work"
        self.repo: str | None = None  # what a push makes, removed before every try
        self._references: dict[str, tuple[Outcome, dict[str, str]]] = {}

    def reference(
        self, start: str, arguments: Sequence[str], result: str, ignored: str
    ) -> tuple[Outcome, dict[str, str]]:
        """Run a command uninterrupted from a state, once, and keep what it leaves as `result`;
        return how it ended and file -> digest of what it leaves.
        """
        if result not in self._references:
            outcome = self._uninterrupted(start, arguments, result)
            self._references[result] = outcome, self.left(ignored)
        return self._references[result]

    def _uninterrupted(self, start: str, arguments: Sequence[str], result: str) -> Outcome:
        self._put(start)
        _forked_import(self.scratch / "modules.json")
        outcome = self._child(arguments)
        _forked_import(self.scratch / "modules.json")
        if outcome.status == 0:
            shutil.rmtree(self.scratch / result, ignore_errors=True)
            shutil.copytree(self.work, self.scratch / result, symlinks=True)
        return outcome

    def again(self, arguments: Sequence[str]) -> Outcome:
        """Run a command on what is there."""
        return self._child(arguments)

    def killed_at(self, start: str, arguments: Sequence[str], number: int) -> Outcome:
        """Run a command and kill it right before an event."""
        self._put(start)
        return self._child(arguments, kill_at=number)

    def refused_at(self, start: str, arguments: Sequence[str], number: int, error: int) -> Outcome:
        """Run a command on a disk that refuses data from an event on."""
        self._put(start)
        return self._child(arguments, kill_at=number, error=error)

    def left(self, ignored: str) -> dict[str, str]:
        """Return file -> digest of what a command left here and on the Hub."""
        there = {} if self.repo is None else repository(self.repo)
        return contents(self.work, ignored) | there

    def _put(self, state: str) -> None:
        for path in (self.work, self.scratch / "tmp"):
            shutil.rmtree(path, ignore_errors=True)
        (self.scratch / "tmp").mkdir()
        if self.repo is not None:
            removed_repository(self.repo)
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


def _forked_import(names: Path) -> None:
    """Import what the children before imported, so that the next ones find it imported."""
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
    """Note every change below `work` in the file `log`; SIGKILL right before number `kill_at`, or,
    where there is an errno, refuse whatever takes room from there on.
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

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            note(f"before {name}")
            result = function(*args, **options)
            note(f"after {name}")
            return result

        return call

    for module, name in OUTSIDE_PYTHON:
        if module in sys.modules and hasattr(sys.modules[module], name):
            function = getattr(sys.modules[module], name)
            setattr(sys.modules[module], name, counted(f"{module}.{name}", function))
    os.fsync = counted("os.fsync", os.fsync)
    sys.addaudithook(hook)


def _absolute(path: Any, folder: int | None) -> str:
    text = os.fsdecode(path) if not isinstance(path, int) else f"/proc/self/fd/{path}"
    if folder is not None and folder >= 0:
        text = str(Path(f"/proc/self/fd/{folder}").readlink() / text)
    return os.path.abspath(text)  # noqa: PTH100 - a link that is removed is not what it names


# -- the repository of a push ----------------------------------------------------------------------


def removed_repository(repo: str) -> None:
    """Remove a repository from the local Hub, if it is there."""
    owner, _, name = repo.partition("/")
    with contextlib.suppress(urllib.error.HTTPError):
        _asked("/api/repos/delete", "DELETE", {"organization": owner, "name": name})


def repository(repo: str) -> dict[str, str]:
    """Return file -> digest of what a repository of the local Hub holds."""
    files = _asked(f"/api/models/{repo}/tree/main?recursive=true")
    return {
        f"hub:{file['path']}": file.get("lfs", {}).get("oid", file["oid"])
        for file in files
        if file["type"] == "file"
    }


def _asked(path: str, method: str = "GET", body: Any = None) -> Any:
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
    """Return file -> sha256 of its content, but for times, of what does not match `ignored`."""
    return dict(_digests(folder, re.compile(ignored)))


def _digests(folder: Path, ignored: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not ignored.search(name):
            data = path.read_bytes()
            if path.suffix in (".json", ".jsonl", ".yaml", ".yml", ".md", ".html"):
                data = untimed(data.decode()).encode()
            if name.endswith(DRAWN_TIMES):
                data = b""
            yield name, hashlib.sha256(data).hexdigest()


def untimed(text: str) -> str:
    """Return a text without what TIMED finds."""
    for pattern in TIMED:
        text = pattern.sub("TIME", text)
    return text


def differing(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Return which files differ, are missing, or are too many."""
    wrong = []
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            is_there = "too many" if name not in expected else "differs"
            wrong.append(f"{name}: {is_there if name in found else 'missing'}")
    return wrong


def _wrong_refusal(
    driver: Driver,
    outcome: Outcome,
    error: int,
    states: tuple[Mapping[str, str], Mapping[str, str]],
    request: Mapping[str, Any],
) -> list[str]:
    """Return what is wrong with how a command ended that the disk refused: it says so in a line, or
    did without what is optional; every file is the one from before or the one from after; nothing
    else is there.
    """
    work, result = driver.work, driver.scratch / request["result"]
    (before, after), left = states, driver.left(request["ignored"])
    optional, resumed = re.compile(request["optional"]), re.compile(request["resumed"])
    wrong = []
    errors = [line for line in outcome.said.splitlines() if line.startswith("error: ")]
    is_said = len(errors) == 1 and os.strerror(error) in errors[0]
    if outcome.status == 0:
        missing = [name for name in differing(left, after) if not optional.search(name)]
        wrong += [f"exit 0 without {name}" for name in missing]
    elif outcome.status != 1 or not is_said or "Traceback" in outcome.said:
        wrong.append("not said")
    for name, digest in left.items():
        if ".partial-" in name:
            wrong.append(f"left behind: {name}")
        elif digest not in (before.get(name), after.get(name)) and not (
            resumed.search(name) and _is_begun(work / name, result / name)
        ):
            wrong.append(f"half-written: {name}")
    for name in before.keys() & after.keys() - left.keys():
        wrong.append(f"lost: {name}")
    return wrong


def _is_begun(file: Path, whole: Path) -> bool:
    """Whether a log holds the first lines of another; true of other files."""
    if file.suffix != ".jsonl" or not whole.exists():
        return True
    found, expected = (untimed(each.read_text()).splitlines() for each in (file, whole))
    return found == expected[: len(found)]


def tried(driver: Driver, request: Mapping[str, Any]) -> dict[str, Any]:
    """Kill one command as often as asked, and return how often it failed, and how."""
    start, arguments, ignored = request["start"], request["arguments"], request["ignored"]
    driver.repo = request.get("repo")
    whole, expected = driver.reference(start, arguments, request["result"], ignored)
    if whole.status != 0:
        return {"n_events": 0, "tried": 0, "failed": [f"uninterrupted: {whole.said}"]}
    before = contents(driver.scratch / start, ignored)
    numbers = _chosen(len(whole.events), request)
    failed = []
    for number in numbers:
        error, event = ERRORS[number % len(ERRORS)], whole.events[number - 1]
        wrong: list[str] = []
        if request["is_refused"]:
            first = last = driver.refused_at(start, arguments, number, error)
            wrong = _wrong_refusal(driver, first, error, (before, expected), request)
        else:
            first = last = driver.killed_at(start, arguments, number)
        if request["is_refused"] or first.status == -signal.SIGKILL:
            last = driver.again(arguments)
        found = differing(driver.left(ignored), expected)
        ended = last.status == 0 or re.search(request["accepted"], last.said) is not None
        if not ended or found:
            failed.append(f"{number} ({event}): again: exit {last.status}, {found}, {_end(last)}")
        if wrong:
            how = f"exit {first.status}, {wrong}, {_end(first)}"
            failed.append(f"{number} ({event}): {os.strerror(error)}: {how}")
        told = f"{request['name']} {number}/{len(whole.events)}: {len(failed)} failed\n"
        sys.stderr.write(told)
        sys.stderr.flush()
    return {"n_events": len(whole.events), "tried": len(numbers), "failed": failed}


def _chosen(n_events: int, request: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the events to try: all, or a sample."""
    numbers = list(range(1, n_events + 1))
    if request["sample"] is None:
        return numbers
    n_chosen = min(request["sample"], n_events)
    return sorted(random.Random(request["seed"]).sample(numbers, n_chosen))


def _end(outcome: Outcome) -> str:
    return " | ".join(outcome.said.strip().splitlines()[-4:])


def main() -> None:
    """Answer requests until stdin ends."""
    import torch

    torch.set_num_threads(1)
    driver = Driver(Path(sys.argv[1]))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(tried(driver, json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
