"""The names of lm-eval's tasks, read from its YAML files without importing it.

lm-eval itself parses all of its 14,000 files for an index, which takes seven seconds of processor
time. Here only a few lines of each are looked at, so that a misspelt task is refused at once, and
lm-eval indexes only the folders of the tasks that are asked for.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import yaml

from optimer_hf.files.model import Mistake
from optimer_hf.files.paths import Place
from optimer_hf.files.text import did_you_mean
from optimer_hf.scoring.objective import Objective

# a key at the start of a line, with the lines that belong to it
KEY = re.compile(r"""^(["']?)(task|group|tag|class)\1[ \t]*:(.*(?:\n(?:[ \t]+|-).*)*)""", re.M)
PLAIN = re.compile(r"[ \t]*([\w./+-]+)[ \t]*")
OTHERS = (".py", ".pyc", ".md", ".json", ".jsonl", ".sh")  # all else may be a part of a YAML file
IGNORED = ("__pycache__", ".ipynb_checkpoints")


@dataclass
class TaskNames:
    """The tasks in a folder with the files that define them, and its groups and tags of tasks."""

    folder: Path | None = None
    tasks: dict[str, Path] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)


def read_task_names(folder: Path | None) -> TaskNames:
    """Return the names that lm-eval finds in a folder of tasks (None: there is no folder). Of
    several tasks of one name, the first file by name counts, as there. Some tags may be among the
    groups that no task has.
    """
    names = TaskNames(folder)
    for path in sorted(_walk(folder) if folder is not None else ()):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = {key: text for _, key, text in KEY.findall(file.read())}
        names.groups.update(_values(lines.get("tag", "")))
        if not path.endswith(".yaml"):
            continue
        if "group" in lines and "class" not in lines:
            names.groups.update(_values(lines["group"]) - names.tasks.keys())
        else:
            for name in _values(lines.get("task", "")) - names.groups:
                names.tasks.setdefault(name, Path(path))
    return names


def _walk(folder: Path | str) -> Iterator[str]:
    """Yield the files in a folder that may be YAML, at any depth."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name not in IGNORED:
                    yield from _walk(entry.path)
            elif not entry.name.endswith(OTHERS):
                yield entry.path


def _values(text: str) -> set[str]:
    """Return the texts that a value in YAML consists of: one, or those of a list."""
    if plain := PLAIN.fullmatch(text):
        return {plain[1]}
    try:
        value = yaml.load(text, yaml.CBaseLoader)
    except yaml.YAMLError:
        return set()
    values = value if isinstance(value, list) else [value]
    return {each for each in values if isinstance(each, str)}


@cache
def shipped_names() -> TaskNames:
    """Return the names that come with lm-eval; none if it is not installed."""
    spec = PathFinder.find_spec("lm_eval") or find_spec("lm_eval")  # the latter: editable installs
    folders = [Path(each) / "tasks" for each in (spec and spec.submodule_search_locations) or []]
    return next((read_task_names(each) for each in folders if each.is_dir()), TaskNames())


def fault_of_task(name: str, own: TaskNames) -> str | None:
    """Return what is wrong with the name of a task; None if lm-eval has one of that name, or a
    person's `own` folder does.
    """
    if name in own.tasks:
        return None
    shipped = TaskNames() if name in own.groups else shipped_names()
    if name in shipped.tasks:
        return None
    if name in own.groups | shipped.groups:
        return (
            f"{name!r} is a group of tasks in lm-eval. Name its tasks, each in a term of its own."
        )
    where = "" if own.folder is None else f" or {own.folder}"
    hint = did_you_mean(name, [*own.tasks, *shipped.tasks])
    return f"no task named {name!r} in lm-eval{where}.{hint}"


def folders_of_tasks(names: Sequence[str], own: TaskNames) -> list[Path]:
    """Return the folders in which tasks of these names are defined: those of lm-eval, and last a
    person's own folder, which counts more.
    """
    shipped = [shipped_names().tasks[name].parent for name in names if name not in own.tasks]
    return list(dict.fromkeys([*shipped, *filter(None, [own.folder])]))


def list_unknown_tasks(objective: Objective, at: Place = ()) -> Iterator[Mistake]:
    """Yield the tasks of an objective that do not exist, with their places in a file in which the
    objective is at `at`. A folder of tasks that is not there is no concern of this.
    """
    folder = objective.include_path
    if folder is not None and not folder.is_dir():
        return
    own = read_task_names(folder)
    for group, terms in (("terms", objective.terms), ("constraints", objective.constraints)):
        for index, term in enumerate(terms):
            if term.task is not None and (fault := fault_of_task(term.task, own)):
                yield (*at, group, index, "task"), fault
