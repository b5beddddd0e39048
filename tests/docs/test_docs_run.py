"""Every command and snippet of the README and docs/ is run, in the order of the page.

A section is followed in a small world (tests/pages_world.py): a folder with the files that the
pages speak of, tiny models under the names that the pages use on the local Hub, nothing in the
caches. What is changed before it is run stands in the tables below, and so does what is not run; an
entry that no page needs any more fails.
"""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner
from huggingface_hub import constants

from optimer_hf.cli import main
from optimer_hf.study.config import StudyConfig
from tests.support.gguf import write_llama
from tests.support.minihub.running import HUB
from tests.support.pages import ROOT, Section, sections
from tests.support.pages_world import BASE, DEMO_BASE, TOKEN, USER, write_files, write_models
from tests.support.tiny import tiny_model

SECTIONS = sections()
COMMANDS = main.list_commands(click.Context(main))

NOT_RUN = {
    "pip install -c constraints.txt -e .": "changes the environment; .ci/run does it",
    "pip install -c constraints.txt -e '.[demo]'": "changes the environment; .ci/run does it",
    "pip install -c constraints.txt torch": "changes the environment",
    "pip install optimer-hf": "not published yet",
    "pip install deepspeed": "changes the environment, also that of the tests after it",
    "pip install optuna cma": "changes the environment",
    "pip install 'optimer-hf[vllm]'": "gigabytes; .ci/vllm installs it for the CPU",
    "optimer evaluate merged objective.yaml --engine": "vLLM; tests/searching/test_vllm.py does it",
    "hf auth login": "asks for a token",
    "mergekit-yaml THIS.yml OUT": "what was printed; tests/journeys/test_mergekit_user.py does it",
    "python benchmarks/demo.py": "minutes, and the base of the demo",
    "python benchmarks/merge.py": "minutes, and gigabytes of weights",
    "python benchmarks/search.py": "hours",
    "python benchmarks/large_pool.py": "minutes, and vectors of the demo's base",
    "python benchmarks/precision.py": "the base of the demo",
    "python benchmarks/gradients.py": "minutes",
    "python benchmarks/gpu.py": "a GPU",
    "python benchmarks/spin.py": "minutes, and a machine of its own",
    "python benchmarks/plan_27b.py": "test_27b.py runs it",
    "optimer run my-recipe": "a million tokens; tests/journeys/test_pretraining.py has fewer",
    "optimer run recipes/mine out": "a GPU; tests/experiment/test_seeds.py does it",
    "optimer plan recipes/mine --on": "a base of 27 B parameters; benchmarks/plan_27b.py does it",
    'python3 -m venv "${VENV:-.venv}"': "the two blocks that .ci/run has, too",
}
NO_COMMANDS = {
    "theta(w) = ": "a formula",
    "1 / (1 - s + s / (1 + 0.7 K))": "a formula",
    "google/gemma-3-27b-pt (27 billion": "a plan; test_27b.py compares it with that of its script",
    "device_map: auto": "two lines of a study.yaml",
    "runs/gemma-3-270m-demo/": "a listing; a test below looks for its files",
}

# Before it is run, sizes shrink, and what only other machines have gets a name of this one.
CHANGED = {
    "n_trials: 30": "n_trials: 6",
    "rescore_top: 3": "rescore_top: 1",
    "rescore_limit: 300": "rescore_limit: 6",
    "limit: 100": "limit: 4",
    "max_gen_toks: 160": "max_gen_toks: 5",
    "block_size: 1024": "block_size: 32",
    "max_tokens: 1_000_000": "max_tokens: 512",
    "max_tokens: 2_000_000": "max_tokens: 512",
    "--n-trials 50": "--n-trials 8",
    "--tokens 1_000_000": "--tokens 1_024",
    "--workers 2": "--workers 1",
    "LOGIN_NODE": "127.0.0.1",
    DEMO_BASE: BASE,
    '"n_trials": 30': '"n_trials": 6, "rescore_top": 0',
    '"limit": 100': '"limit": 4',
    "objective={": 'objective={"include_path": "tasks", ',
}
# The tasks that ship with lm-eval take ten seconds to find, so gsm8k is in a folder of the world.
TASK_PATH = "include_path: tasks"
TASKS = (re.compile(r"^( *)terms:", flags=re.M), rf"\1{TASK_PATH}\n\1terms:")

# What the words in capitals stand for in the world; OUT is new each time.
PLACEHOLDERS = {
    "RECIPE_DIR": "my-recipe",
    "STUDY_DIR": "my-study",
    "STUDY.yaml": "study.yaml",
    "TRAIN.yaml": "train-math.yaml",
    "OBJECTIVE.yaml": "gsm8k-objective.yaml",
    "RECIPE.yaml": "recipe.yaml",
    "CONFIG.yaml": "my-merge.yml",
    "FILE...": "study.yaml train-math.yaml my-merge.yml",
    "CORPUS...": "math.jsonl code.jsonl",
    "VECTOR...": "vectors/math vectors/code",
    "TUNED": "my-model",
    "BASE": "google/gemma-3-270m",
    "SOURCE...": "math=vectors/math",
    "MODEL": "merged",
    "MODEL.gguf": "tiny.gguf",
    "DIR": "vectors/math",
    "REPO": "you/my-vector",
    "PATH": "schema.json",
}
# What a person has done before who comes to a section: `optimer run` with the study that the
# section on evidence shows, or what stands here.
EVIDENCE = "docs/how-to/evidence.md"
WITH_A_STUDY = {
    "README.md: See it work: the demo",
    EVIDENCE,
    "README.md: Commands",
    "docs/how-to/hub.md",
    "docs/how-to/ratios.md",
    "docs/how-to/vectors.md",
}
BASE_IS_HERE = "optimer evaluate google/gemma-3-270m objective.yaml"  # fetched, for `optimer plan`
BEFORE = {
    "docs/how-to/steer.md": "optimer search study.yaml my-study",
    "README.md: Commands": BASE_IS_HERE,
    "docs/how-to/lora.md": "optimer search lora-study.yaml my-study",
    "README.md: Share it": "optimer search study.yaml my-study",
    "docs/tutorial.md": BASE_IS_HERE,
    "docs/how-to/retarget.md": "optimer search study.yaml my-study",
}
FILES = {  # where a YAML block is written, by a field that only its kind has
    "vectors": ["study.yaml"],
    "corpus": ["train-math.yaml"],
    "mixture": ["train-mixed.yaml"],
    "terms": ["objective.yaml", "other-objective.yaml"],
    "compute_environment": [],  # of accelerate; tests/docs/test_accelerate_configs.py reads them
}
PROGRAMS = {"optimer", "hf", "pip", "python", "mkdocs", "dask", "accelerate", "eval"}
OUTPUTS = {"out", "study_dir", "recipe_yaml", "figures", "figure"}


# -- the world -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def online() -> Iterator[None]:
    """The local Hub, online, where `you` may write; other processes find it and this package."""
    patch = pytest.MonkeyPatch()
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_HUB_OFFLINE", "0")
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setenv("OMP_NUM_THREADS", "1")  # models of this size only wait for more threads
    patch.setitem(HUB.tokens, TOKEN, USER)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    HUB.faults.clear()
    HUB.leaks.clear()
    yield
    torch.set_num_threads(n_threads)
    patch.undo()
    assert not HUB.leaks, HUB.leaks


@pytest.fixture(scope="module")
def made(
    online, tmp_path_factory, make_base, make_tuned, make_adapter, corpus_dir, tokenizer
) -> Path:
    """A folder: `world`, in which everything happens, and `plain`, a copy of how it begins."""
    out = tmp_path_factory.mktemp("pages")
    (out / "world").mkdir()
    write_files(out / "world", corpus_dir)
    write_llama(out / "world" / "tiny.gguf", tiny_model("llama"), tokenizer)
    write_models(out / "world", make_base, make_tuned, make_adapter, out)
    shutil.copytree(out / "world", out / "plain")
    return out


@pytest.fixture(scope="module")
def made_with_a_study(made) -> Path:
    """The same with `studied` in it: the world after the run of a recipe folder, whose study is
    that of the README.
    """
    begin(made, "plain")
    with contextlib.chdir(made / "world"):
        (section,) = (section for section in SECTIONS if section.name == EVIDENCE)
        for block in section.blocks("yaml"):
            write_yaml(block)
        Path("my-recipe").mkdir()
        for path in (*Path().glob("train-*.yaml"), *Path().glob("*.jsonl"), Path("study.yaml")):
            shutil.copy(path, "my-recipe")
        shutil.copytree("tasks", "my-recipe/tasks")
        optimer("optimer run my-recipe")
        Path("runs/gemma-3-270m-demo").symlink_to("my-recipe")
        shutil.copytree("runs/my-recipe/study", "my-study")
        config = StudyConfig.read(Path("runs/my-recipe/study/study.json"))
        for copy in ("my-study/study.json", "study.yaml"):  # JSON is YAML; its paths are relative
            config.write(Path(copy))
        shutil.copytree("runs/my-recipe/vectors", "vectors")
        optimer("optimer recipe my-study recipe.yaml")
        optimer("optimer build recipe.yaml merged")
    shutil.copytree(made / "world", made / "studied", symlinks=True)
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


def enter(request: pytest.FixtureRequest, name: str) -> Path:
    """Return the folder in which a section begins."""
    studied = name in WITH_A_STUDY
    made = request.getfixturevalue("made_with_a_study" if studied else "made")
    begin(made, "studied" if studied else "plain")
    return made / "world"


# -- what a page shows -----------------------------------------------------------------------------


def lines_of(section: Section) -> list[str]:
    """Return the commands of a section: every line of a block, and the spans in prose that begin
    with a program, or a command of `optimer`, and say more than its name.
    """
    blocks = section.blocks("sh", "bash", "indented")
    blocks = [block for block in blocks if not block.startswith(tuple(NO_COMMANDS))]
    lines = [line for block in blocks for line in block.splitlines()]
    for span in section.blocks("inline"):
        first, _, rest = span.partition(" ")
        if rest and first in PROGRAMS:
            lines.append(span)
        elif rest and first in COMMANDS:
            lines.append(f"optimer {span}")
    return [re.sub(r"\s+# .*", "", line.strip()) for line in lines]


def pythons_of(section: Section) -> list[str]:
    """Return the Python of a section: blocks, imports in prose, and the call in the listing."""
    imports = [span for span in section.blocks("inline") if re.match(r"(from|import) ", span)]
    calls = re.findall(r"AutoModel\S*\(\S+\)", "".join(section.blocks("indented")))
    calls = [f"from transformers import AutoModelForCausalLM\n{call}" for call in calls]
    return [*section.blocks("python"), *imports, *calls]


def is_run(line: str) -> bool:
    is_excused = line.startswith(tuple(NOT_RUN))
    assert is_excused or not line.startswith("pip install"), f"{line}: add it to NOT_RUN"
    return not is_excused


def changed(text: str) -> str:
    for old, new in CHANGED.items():
        text = text.replace(old, new)
    return text


def usages(line: str) -> list[str]:
    """Return a line without what may be left out, once for each of its alternatives."""
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
                run_optimer(" ".join(self.meant(word) for word in usage.split(" ")))
        elif line.startswith("sbatch "):  # SLURM's part is to start what it wraps
            self.start(shlex.split(line)[-1])
        elif line.endswith("&"):
            self.start(line.removesuffix("&"))
            wait_for(self.port)
        elif line.startswith("accelerate launch "):
            # The training of the page, here; test_train has the same with two processes:
            # test_two_processes_give_the_losses_of_one_with_twice_the_batch
            options = launch_command_parser().parse_args(shlex.split(line)[2:])
            assert options.module and options.training_script == "optimer_hf"
            run_optimer(f"optimer {' '.join(options.training_script_args)}")
        else:
            bash(line)

    def meant(self, word: str) -> str:
        """Return what a word in capitals stands for."""
        if word == "OUT":
            self.n_outs += 1
            return f"out-{self.n_outs}"
        return PLACEHOLDERS.get(word, word)

    def start(self, line: str) -> None:
        program, *words = shlex.split(line)
        command = [str(Path(sys.executable).with_name(program)), *words]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
        self.background.append(process)

    def close(self) -> None:
        """End what runs in the background, which has to be running still."""
        ended = [process.args for process in self.background if process.poll() is not None]
        for process in reversed(self.background):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
        assert not ended, ended


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        opened = Terminal(free.getsockname()[1])
    yield opened
    opened.close()


def wait_for(port: int) -> None:
    """Wait until somebody listens, as long as a busy machine takes to start a program."""
    for _ in range(240):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.5)
    raise AssertionError(f"nobody listens on port {port}")


def run_optimer(line: str) -> None:
    words = line.split(" ")[1:]
    if ">" in words:
        bash(line)
    elif is_mention(words):
        known = {
            option
            for each in main.get_command(click.Context(main), words[0]).params
            for option in each.opts
        }
        assert set(words[1:]) <= known, line
    else:
        optimer(line)


def is_mention(words: Sequence[str]) -> bool:
    """Whether the words only name a command that needs more, maybe with options of it."""
    command = main.get_command(click.Context(main), words[0])
    arguments = [each for each in command.params if each.required] if command is not None else []
    return bool(arguments) and all(word.startswith("-") for word in words[1:])


def optimer(line: str) -> None:
    """Run the command line in this process; it has to succeed and write what it was told to."""
    words = [
        name
        for word in shlex.split(line)[1:]
        for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    result = CliRunner().invoke(main, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{line}\n{result.output}"
    for name, value in parameters(words).items():
        if name in OUTPUTS and value is not None:
            assert value.exists(), f"{line} did not write {value}"


def parameters(words: Sequence[str]) -> dict[str, Any]:
    """Return what click makes of the words after `optimer`."""
    command: click.Command = main
    while isinstance(command, click.Group):
        command, words = command.get_command(click.Context(command), words[0]), words[1:]
    return command.make_context(command.name, list(words)).params


def bash(line: str) -> None:
    """Run a line in a shell that finds the programs of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr[-3000:]}"


def write_yaml(text: str) -> None:
    """Write a file that a section shows; it is valid as it is shown and as it is used. A block with
    `search` alone changes the study before it.
    """
    data = yaml.safe_load(text)
    if list(data) == ["search"]:
        data = yaml.safe_load(Path("study.yaml").read_text(encoding="utf-8")) | data
        text = yaml.safe_dump(data, sort_keys=False)
    names = next(names for key, names in FILES.items() if key in data)
    used = changed(text) if TASK_PATH in text else TASKS[0].sub(TASKS[1], changed(text))
    for content in (text, used):
        for name in names:
            Path(name).write_text(content, encoding="utf-8")
            optimer(f"optimer validate {name}")


def write_modules(section: Section) -> None:
    """Write the Python files that a section shows: blocks whose first line is their name."""
    for text in section.blocks("python"):
        if (name := re.match(r"# (\w+\.py)\n", text)) is not None:
            Path(name[1]).write_text(text, encoding="utf-8")


# -- the tests -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_a_section_works_from_its_begin_to_its_end(section, request, terminal, monkeypatch):
    monkeypatch.chdir(enter(request, section.name))
    write_modules(section)
    for block in section.blocks("yaml"):
        write_yaml(block)
    if section.name in BEFORE:
        terminal.run(BEFORE[section.name])
    for line in lines_of(section):
        if is_run(line):
            terminal.run(line)
    names: dict[str, Any] = {}  # of all blocks of a page together, as a person would type them
    for text in pythons_of(section):
        exec(compile(changed(text), section.name, "exec"), names)


@pytest.mark.slow
def test_a_run_writes_every_file_that_the_readme_lists(request):
    (listing,) = (
        block
        for section in SECTIONS
        for block in section.blocks("indented")
        if block.startswith("runs/")
    )
    folder, *lines = re.sub(r"\S+\(.*?\)", "", listing).splitlines()
    promised = re.findall(r"[\w-]+(?:\.\w+)+|\w+/", "\n".join(lines))
    assert len(promised) > 8
    world = enter(request, "README.md: See it work: the demo")
    assert [name for name in promised if not (world / folder / name).exists()] == []


@pytest.mark.parametrize(
    "line", ["optimer serch a b", "optimer search a b --n-trails 3", "optimer build --out", "false"]
)
def test_a_wrong_line_is_noticed(terminal, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        terminal.run(line)


def test_every_block_is_of_a_kind_that_is_run():
    kinds = {snippet.language for section in SECTIONS for snippet in section.snippets}
    assert kinds <= {"sh", "bash", "indented", "inline", "yaml", "toml", "python", ""}


def test_no_table_has_an_entry_that_no_page_needs():
    lines = {section.name: lines_of(section) for section in SECTIONS}
    every_line = [line for found in lines.values() for line in found]
    blocks = [snippet.text for section in SECTIONS for snippet in section.snippets]
    words = {word for line in every_line for usage in usages(line) for word in usage.split(" ")}
    assert [e for e in NOT_RUN if not any(line.startswith(e) for line in every_line)] == []
    assert [e for e in NO_COMMANDS if not any(block.startswith(e) for block in blocks)] == []
    assert [e for e in CHANGED if not any(e in block for block in blocks)] == []
    assert set(PLACEHOLDERS) <= words
    assert WITH_A_STUDY | set(BEFORE) <= set(lines)
