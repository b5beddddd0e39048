"""Every command and snippet of the README and docs/ is run, in the order of the page.

A section is followed in a small world (tests/pages_world.py): a folder with the files that the
pages speak of, tiny models under the names that the pages use on the local Hub, nothing in the
caches. What is changed before it is run stands in the tables below, and so does what is not run; an
entry that no page needs any more fails.
"""

import contextlib
import glob
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import constants
from minihub.running import HUB
from pages import ROOT, Section, sections
from pages_world import BASE, DEMO_BASE, TOKEN, USER, write_files, write_models

from optimer_hf.cli import main

SECTIONS = sections()

NOT_RUN = {
    "pip install -c constraints.txt -e .": "changes the environment; .ci/run does it",
    "pip install -c constraints.txt -e '.[demo]'": "changes the environment; .ci/run does it",
    "pip install -c constraints.txt -e '.[docs]' && mkdocs serve": "a server; .ci/run builds docs/",
    "pip install optuna cma": "changes the environment",
    "hf auth login": "asks for a token",
    "python benchmarks/demo.py": "minutes, and the base of the demo",
    "python benchmarks/merge.py": "minutes, and gigabytes of weights",
    "python benchmarks/search.py": "hours",
    'python3 -m venv "${VENV:-.venv}"': "the two blocks that .ci/run takes from the README",
}
RUN_ELSEWHERE = {  # what begins so, and the page that runs it, when it takes long
    "README.md: Train your own vectors": ("accelerate launch", "docs/how-to/gpus.md"),
}
NO_COMMANDS = {
    "theta(w) = ": "a formula",
    "runs/gemma-3-270m-demo/": "a listing; a test below looks for its files",
}

# Before it is run, sizes shrink, and what only other machines have gets a name of this one.
CHANGED = {
    "n_trials: 30": "n_trials: 6",
    "rescore_top: 3": "rescore_top: 1",
    "rescore_limit: 300": "rescore_limit: 4",
    "limit: 100": "limit: 4",
    "max_gen_toks: 160": "max_gen_toks: 5",
    "block_size: 1024": "block_size: 32",
    "max_tokens: 1_000_000": "max_tokens: 512",
    "max_tokens: 2_000_000": "max_tokens: 512",
    "--n-trials 50": "--n-trials 8",
    "--tokens 1_000_000": "--tokens 256",
    "--num_processes 4": "--num_processes 2 --main_process_port 0",
    "LOGIN_NODE": "127.0.0.1",
    DEMO_BASE: BASE,
    'Path("study.yaml")': 'Path("brevity.yaml")',
    'Path("my-study")': 'Path("my-brevity")',
}
# The tasks that ship with lm-eval take ten seconds to find, so gsm8k is in a folder of the world.
TASKS = (re.compile(r"^( *)terms:", flags=re.M), r"\1include_path: tasks\n\1terms:")

# What the words in capitals stand for in the world; OUT is new each time.
PLACEHOLDERS = {
    "RECIPE_DIR": "recipes/gemma-3-270m-demo",
    "RUN_DIR": "runs/gemma-3-270m-demo",
    "STUDY_DIR": "my-study",
    "STUDY.yaml": "study.yaml",
    "TRAIN.yaml": "train-math.yaml",
    "OBJECTIVE.yaml": "other-objective.yaml",
    "RECIPE.yaml": "recipe.yaml",
    "CONFIG.yaml": "my-merge.yml",
    "FILE...": "study.yaml train-math.yaml my-merge.yml",
    "CORPUS...": "math.jsonl code.jsonl",
    "VECTOR...": "vectors/math vectors/code",
    "TUNED": "my-model",
    "BASE": "google/gemma-3-270m",
    "MODEL": "merged",
    "MODEL.gguf": "tiny.gguf",
    "DIR": "vectors/math",
    "REPO": "you/my-vector",
    "PATH": "schema.json",
}
# What a person has done before who comes to a section.
BEFORE = {
    "README.md: Steer the search": ["optimer search study.yaml my-study"],
    "README.md: Is the merge really better?": [
        "mkdir my-recipe",
        "cp -r study.yaml train-math.yaml train-code.yaml math.jsonl code.jsonl gsm8k.jsonl tasks my-recipe",
        "optimer run my-recipe",
        "cp -r runs/my-recipe/study my-study",
    ],
    "README.md: Commands": ["optimer evaluate google/gemma-3-270m objective.yaml"],
    "docs/tutorial.md": ["optimer evaluate google/gemma-3-270m objective.yaml"],  # the base is here
}
WITH_A_STUDY = {
    "README.md: See it work: the demo",
    "README.md: Vectors and merges",
    "README.md: Share it: the Hub",
    "README.md: Commands",
    "docs/how-to/hub.md",
    "docs/how-to/ratios.md",
    "docs/how-to/retarget.md",
}
FILES = {  # where a YAML block is written, by a field that only its kind has
    "vectors": ["study.yaml"],
    "corpus": ["train-math.yaml"],
    "mixture": ["train-mixed.yaml"],
    "terms": ["objective.yaml", "other-objective.yaml"],
}
PROGRAMS = {"optimer", "hf", "pip", "python", "mkdocs", "dask", "accelerate", "eval", *main.commands}
OUTPUTS = {"out", "study_dir", "recipe_yaml", "figures", "figure"}


# -- the world -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def online() -> Iterator[None]:
    """The local Hub, online, where `you` may write; slow processes find this package and it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_HUB_OFFLINE", "0")
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setitem(HUB.tokens, TOKEN, USER)
    HUB.faults.clear()
    HUB.leaks.clear()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models of this size only wait for more
    yield
    torch.set_num_threads(n_threads)
    assert not HUB.leaks, HUB.leaks
    patch.undo()


@pytest.fixture(scope="module")
def made(online, tmp_path_factory, make_base, make_tuned, make_adapter, corpus_dir) -> Path:
    """A folder: `world`, in which everything happens, and `plain`, a copy of how it begins."""
    out = tmp_path_factory.mktemp("pages")
    (out / "world").mkdir()
    write_files(out / "world", corpus_dir)
    write_models(out / "world", make_base, make_tuned, make_adapter, out)
    shutil.copytree(out / "world", out / "plain")
    return out


@pytest.fixture(scope="module")
def made_with_a_study(made) -> Path:
    """The same with `studied` in it: how the world looks after the demo."""
    begin(made, "plain")
    world = made / "world"
    with contextlib.chdir(world):
        optimer("optimer run recipes/gemma-3-270m-demo")
        shutil.copytree("runs/gemma-3-270m-demo/study", "my-study")
        shutil.copytree("runs/gemma-3-270m-demo/vectors", "vectors")
        shutil.copy("my-study/study.json", "study.yaml")  # JSON is YAML
        optimer("optimer recipe my-study recipe.yaml")
        optimer("optimer build recipe.yaml merged")
        Path("runs/my-recipe").symlink_to("gemma-3-270m-demo")
    shutil.copytree(world, made / "studied", symlinks=True)
    return made


def begin(made: Path, state: str) -> None:
    """Put the world into a state, with nothing of it in the caches and nothing of `you` online."""
    shutil.rmtree(made / "world")
    shutil.copytree(made / state, made / "world", symlinks=True)
    for owner in ("google", "your-name", "you"):
        for cached in Path(constants.HF_HUB_CACHE).glob(f"models--{owner}--*"):
            shutil.rmtree(cached)
    for repo in list(HUB.store.repos.values()):
        if repo.id.startswith("you/"):
            HUB.store.delete(repo)


@pytest.fixture
def world(request, made, monkeypatch) -> Path:
    """The world as the section of the test finds it, and the working directory."""
    section = request.getfixturevalue("section")
    studied = section.name in WITH_A_STUDY
    begin(request.getfixturevalue("made_with_a_study") if studied else made, "studied" if studied else "plain")
    monkeypatch.chdir(made / "world")
    return made / "world"


# -- what a page asks for --------------------------------------------------------------------------


def lines_of(section: Section) -> list[str]:
    """Return the commands of a section: every line of a block, and the spans that begin with a
    program and say more than its name.
    """
    blocks = section.blocks("sh", "bash", "indented")
    blocks = [block for block in blocks if not block.startswith(tuple(NO_COMMANDS))]
    found = [line for block in blocks for line in block.splitlines()]
    for span in section.blocks("inline"):
        words = span.split()
        if len(words) > 1 and words[0] in PROGRAMS:
            found.append(span if words[0] not in main.commands else f"optimer {span}")
    return [re.sub(r"\s+# .*", "", line.strip()) for line in found]


def changed(text: str) -> str:
    for old, new in CHANGED.items():
        text = text.replace(old, new)
    return text


def is_run(line: str) -> bool:
    return not line.startswith(tuple(NOT_RUN))


def usages(line: str) -> list[str]:
    """Return a line with what may be left out left out, one for each of its alternatives."""
    line = re.sub(r" ?\[[^]]*\]", "", line)
    words = [word.split("|") for word in line.split(" ")]
    return [" ".join(choice) for choice in itertools.product(*words)]


# -- running it ------------------------------------------------------------------------------------


@dataclass
class Terminal:
    """Where a section is followed: what runs in the background, and names that were given out."""

    port: int
    background: list[subprocess.Popen] = field(default_factory=list)
    n_outs: int = 0

    def run(self, line: str) -> None:
        """Run a line as a person would; fail when it does."""
        line = changed(line).replace("8786", str(self.port))
        if line.startswith("optimer "):
            for usage in usages(line):
                self.run_optimer([self.meant(word) for word in usage.split(" ")])
        elif line.startswith("sbatch "):  # SLURM's part is to start what it wraps
            self.start(shlex.split(line)[-1])
        elif line.endswith("&"):
            self.start(line.removesuffix("&"))
        else:
            bash(line)

    def run_optimer(self, words: Sequence[str]) -> None:
        line = " ".join(words)
        if ">" in words:
            bash(line)
        elif is_mention(words[1:]):
            check_options(words[1:])
        else:
            optimer(line)

    def meant(self, word: str) -> str:
        """Return what a word in capitals stands for."""
        if word == "OUT":
            self.n_outs += 1
            return f"out-{self.n_outs}"
        return PLACEHOLDERS.get(word, word)

    def start(self, line: str) -> None:
        command = shlex.split(line)
        command[0] = str(Path(sys.executable).with_name(command[0]))
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
        self.background.append(process)

    def close(self) -> None:
        for process in reversed(self.background):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        opened = Terminal(free.getsockname()[1])
    yield opened
    opened.close()


def optimer(line: str) -> None:
    """Run the command line in this process; it has to succeed and write what it was told to."""
    words = [
        name
        for word in shlex.split(line)[1:]
        for name in (sorted(glob.glob(word)) if "*" in word else [word])
    ]
    result = CliRunner().invoke(main, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{line}\n{result.output}"
    for name, value in parse(words).params.items():
        if name in OUTPUTS and value is not None:
            assert value.exists(), f"{line} did not write {value}"


def parse(words: Sequence[str]) -> click.Context:
    """Parse the words after `optimer` as click would."""
    command: click.Command = main
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    return command.make_context(command.name, list(words))


def is_mention(words: Sequence[str]) -> bool:
    """Whether the words only name a command, maybe with options of it."""
    command = main.commands[words[0]]
    needs = any(isinstance(each, click.Argument) and each.required for each in command.params)
    return needs and all(word.startswith("-") for word in words[1:])


def check_options(words: Sequence[str]) -> None:
    known = {option for each in main.commands[words[0]].params for option in each.opts}
    assert set(words[1:]) <= known, words


def bash(line: str) -> None:
    """Run a line in a shell that finds the programs of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr[-3000:]}"


def write_yaml(text: str) -> None:
    """Write a file that a section shows, and validate it as it is shown and as it is used."""
    names = next(names for key, names in FILES.items() if key in yaml.safe_load(text))
    for content in (text, TASKS[0].sub(TASKS[1], changed(text))):
        for name in names:
            Path(name).write_text(content, encoding="utf-8")
            optimer(f"optimer validate {name}")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_a_section_works_from_its_begin_to_its_end(section, world, terminal):
    for block in section.blocks("yaml"):
        write_yaml(block)
    for line in [*BEFORE.get(section.name, []), *lines_of(section)]:
        if is_run(line) and not (section.name in RUN_ELSEWHERE and line.startswith(RUN_ELSEWHERE[section.name][0])):
            import time
            a,b=time.process_time(),time.perf_counter()
            try:
                if os.environ.get("PROF") and os.environ["PROF"] in line:
                    import cProfile, pstats
                    with cProfile.Profile() as pr:
                        terminal.run(line)
                    pstats.Stats(pr).sort_stats("cumtime").print_stats(90)
                else:
                    terminal.run(line)
            except BaseException as e:
                print("FAILED", line, str(e)[-600:])
                failed = True
            print(f"TIME {time.process_time()-a:.1f} {time.perf_counter()-b:.1f} {line}")
    assert not locals().get("failed")
