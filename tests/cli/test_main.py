"""The shell: help, errors as one line, exit statuses, signals, completion."""

import ast
import errno
import inspect
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from optimer_hf.cli import Program, main
from optimer_hf.cli.options import Directory, Existing, LoadingCommand
from optimer_hf.errors import ConfigError
from optimer_hf.models.spinning import DECIDING, SPINS
from tests.support.cli import optimer, process

HEAVY = {"torch", "transformers", "lm_eval", "mergekit", "smac", "datasets", "scipy"}


NAMES = main.list_commands(click.Context(main))


def command_of(name: str) -> click.Command:
    return main.get_command(click.Context(main), name)


def commands(group=main):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield from commands(command) if isinstance(command, click.Group) else [command]


EVERY_COMMAND = pytest.mark.parametrize("command", [*commands()], ids=lambda command: command.name)


# -- help ------------------------------------------------------------------------------------------


def test_help_lists_the_commands_in_groups():
    text = optimer("--help").output
    titles = [line for line in text.splitlines() if re.fullmatch(r"[A-Z][\w ]+:", line)]
    assert titles[1:] == ["Make a vector:", "Find weights:", "Evidence:", "Ship:", "Files:"]
    for name in NAMES:
        assert f"  {name} " in text


@pytest.mark.parametrize("name", NAMES)
def test_a_command_is_found_under_its_name_and_explains_itself(name):
    assert command_of(name).name == name
    text = optimer(name, "--help").output
    assert "Usage:" in text and len(text.splitlines()) > 4


@EVERY_COMMAND
def test_the_help_of_a_command_says_what_each_argument_is(command):
    context = click.Context(command, info_name=command.name)
    for argument in command.get_params(context):
        if isinstance(argument, click.Argument):
            name = argument.make_metavar(context).strip("[].")
            assert name in command.help or set(name) & set("{|}"), (command.name, name)


@EVERY_COMMAND
def test_the_help_of_a_command_has_an_example_that_it_can_read(command, monkeypatch):
    for kind in (Existing, Directory):
        monkeypatch.setattr(kind, "convert", lambda self, value, *_: Path(value))
    program, *words = shlex.split(command.epilog.removeprefix("Example: "))
    assert program == "optimer"
    while words[0] != command.name:
        words = words[1:]
    words = words[1 : words.index(">")] if ">" in words else words[1:]
    command.make_context(command.name, words)


@EVERY_COMMAND
def test_the_help_of_an_option_is_a_phrase_that_stands_alone(command):
    for option in command.params:
        if isinstance(option, click.Option):
            text = option.help or ""
            assert re.match(r"(?!Of |Instead |Also )[A-Z][\w'-]+,? \S", text), (option.name, text)
            assert text.endswith("."), (option.name, text)


@EVERY_COMMAND
def test_a_command_is_at_most_25_lines_besides_its_help(command):
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(command.callback))).body
    docstring = function.body[0]
    lines = function.end_lineno - function.lineno + 1
    assert lines - (docstring.end_lineno - docstring.lineno + 1) <= 25


@EVERY_COMMAND
def test_every_number_of_the_command_line_has_bounds(command):
    for option in command.params:
        if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType):
            is_range = isinstance(option.type, click.IntRange | click.FloatRange)
            is_count = getattr(option, "count", False)  # -v -v
            has_both = is_range and None not in (option.type.min, option.type.max)
            assert is_count or has_both, option.name


@pytest.mark.parametrize(
    ("typed", "meant"), [("serach", "search"), ("exrtact", "extract"), ("reciep", "recipe")]
)
def test_a_typo_of_a_command_suggests_the_right_one(typed, meant):
    result = optimer(typed, ok=False)
    assert result.exit_code == 2
    assert f"No such command {typed!r}. Did you mean {meant!r}?" in result.stderr


# -- how it ends -----------------------------------------------------------------------------------


def test_an_error_is_one_line_on_stderr_and_exit_status_1(tmp_path):
    result = optimer("search", tmp_path / "none.yaml", tmp_path / "s", ok=False)
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path / 'none.yaml'}: no such file.\n"
    assert result.stdout == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_anything_is_one_line_with_the_path(monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr("optimer_hf.hub.pull", refused)
    result = optimer("pull", "a/b", ok=False)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: /some/file: {os.strerror(number)}. Free space there, allow access, or give "
        "another place.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere"], "nowhere: no such recipe folder"),
        (["convert", "none.gguf", "out"], "none.gguf: no such file"),
        (["convert", ".", "out"], ".: found a directory. Expected a GGUF file"),
        (["init", "s.yaml", "m=a/m", "m=b/m", "--base", "a/b"], "'m' is the name of another"),
        (["init", "s.yaml", "m=a/m", "b/m", "--base", "a/b"], "as NAME=b/m"),
        (["evaluate", "./none", "obj.yaml"], "no such file or directory"),
        (["compare", "nowhere"], "nowhere: no such directory. `optimer search"),
        (["recipe", ".", "recipe.yaml"], "holds no study"),
        (["extract", "./none", "--base", "./none", "out"], "no such file or directory"),
        (["search", "my-merge.yml", "s"], "Add --objective"),
        (["merge", "obj.yaml", "out"], "obj.yaml: found a file of the kind objective"),
        (["build", "my-merge.yml", "out"], "my-merge.yml: found a file of the kind merge config"),
        (["plan", "my-merge.yml"], "my-merge.yml: found a file of the kind merge config"),
        (["run", "obj.yaml"], "obj.yaml: found a file, expected a recipe folder"),
        *(
            ([command, "obj.yaml", *rest], f"obj.yaml: found a file, expected {what}")
            for what, commands in {
                "the directory of a study": {
                    "compare": [],
                    "report": [],
                    "trials": [],
                    "recipe": ["recipe.yaml"],
                    "retarget": ["obj.yaml"],
                },
                "a directory": {"push": ["a/b"], "status": []},
            }.items()
            for command, rest in commands.items()
        ),
        (["merge", "my-merge.yml", "out", "--engine", "native"], "only mergekit can run"),
    ],
)
def test_what_cannot_be_done_is_an_error_with_its_reason(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    result = optimer(*arguments, ok=False)
    assert (
        result.exit_code == 1 and result.stderr.startswith("error: ") and message in result.stderr
    )
    assert not (folder / "out").exists()


def test_a_wrong_option_is_a_usage_error():
    assert optimer("search", "a", "b", "--n-trials", "0", ok=False).exit_code == 2


STUDY = {
    "base_model": "a/b",
    "vectors": {"w": {"source": "a/w"}},
    "objective": {"terms": [{"task": "arc_easy"}]},
}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--help"], "Usage:"),
        (["merge", "--help"], "--lora-merge-cache"),
        (["pull", "--help", "merge"], "Usage:"),
        (["evaluate", "some-model", "merge"], "merge: no such file"),
        (["search", "none.yaml", "s"], "error: none.yaml: no such file."),
        (["schema", "study"], '"$defs"'),
        (["validate", "study.yaml"], "study.yaml: a valid study"),
        (["validate", "wrong.yaml"], "Did you mean 'vectors'?"),
        (["search", "wrong.yaml", "s"], "Did you mean 'vectors'?"),
        (["train", "train.yaml", "v"], "train.yaml:4: lora.alpha: unknown field of LoraConfig."),
        (["validate", "train.yaml"], "train.yaml:4: lora.alpha: unknown field of LoraConfig."),
        (["validate", "right.yaml"], "right.yaml: a valid train config"),
        (["run", "empty"], "empty: not a recipe folder (it has no study.yaml)."),
        (["plan", "empty"], "empty: not a recipe folder (it has no study.yaml)."),
        (["plan", "."], "study.yaml: field 'test' is missing."),
        (["run", "wrong"], "Did you mean 'vectors'?"),
        (["plan", "wrong"], "Did you mean 'vectors'?"),
        (["plan", "wrong.yaml"], "Did you mean 'vectors'?"),
        (["plan", "train.yaml"], "train.yaml:"),
        (["plan", "linear.yml"], "linear.yml:"),
        (["search", ".", "s"], ".: found a directory, expected a file."),
        (["merge", ".", "out"], ".: found a directory, expected a file."),
        (["validate", "merge.yml"], "merge.yml:2: models.0: unknown field 'modle'"),
        (["merge", "merge.yml", "out"], "merge.yml:2: models.0: unknown field 'modle'"),
        (["search", "merge.yml", "s"], "merge.yml:2: models.0: unknown field 'modle'"),
    ],
)
def test_help_schemas_and_mistakes_answer_without_the_libraries(arguments, says, tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    wrong = STUDY | {"vectros": {}}
    (tmp_path / "wrong").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("wrong.yaml", "wrong/study.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump(wrong), encoding="utf-8")
    train = "name: n\nbase_model: a/b\ncorpus: {path: x.jsonl}\n"
    (tmp_path / "train.yaml").write_text(f"{train}lora: {{alpha: 8}}\n", encoding="utf-8")
    right = "lora: {r: 8, target_modules: all-linear}\ntrainer: {bf16: true, adam_beta2: 0.95}\n"
    (tmp_path / "right.yaml").write_text(train + right, encoding="utf-8")
    (tmp_path / "merge.yml").write_text("merge_method: linear\nmodels: [{modle: a/b}]\n")
    (tmp_path / "linear.yml").write_text("merge_method: linear\nmodels: [{model: a/b}]\n")
    result = process("-X", "importtime", "-m", "optimer_hf", *arguments, cwd=tmp_path)
    assert says in result.stdout + result.stderr
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "optimer_hf.cli" in imported
    assert imported & HEAVY == set()


WITHOUT_LIBRARIES = {"trials", "ratios", "status", "validate", "schema", "init", "cache"}
NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name in {"torch", "transformers", "lm_eval", "mergekit", "smac", "scipy"}:
            sys.stderr.write(f"LOADS {name}\\n")
            sys.exit(3)
sys.meta_path.insert(0, Refuse())
from optimer_hf.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "words",
    [
        *("search study.yaml s", "evaluate a/b objective.yaml", "plan study.yaml", "compare ."),
        *("push . you/x", "pull you/x", "recipes list"),
    ],
)
def test_a_command_says_something_before_it_loads_its_libraries(words, tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    (tmp_path / "objective.yaml").write_text(yaml.safe_dump(STUDY["objective"]), encoding="utf-8")
    result = process("-c", NO_TORCH, *words.split(), cwd=tmp_path)
    first, *_ = result.stderr.splitlines()
    assert first.removesuffix(": loading libraries") in (words, words.split()[0])
    assert "LOADS" in result.stderr


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("run .", {"train-v.yaml": "base_model corpus.path"}),
        ("run .", {"study.yaml": "base_model test.terms.0.text objective.terms.1.task"}),
        ("plan study.yaml", {"study.yaml": "vectors.w.source objective.terms.1.task"}),
        ("search study.yaml s", {"study.yaml": "vectors.w.source test.terms.0.text"}),
        ("search m.yaml s --objective o.yaml", {"o.yaml": "terms.0.text terms.1.task"}),
        ("search m.yaml s --objective o.yaml", {"m.yaml": "base_model models.0.model"}),
        ("evaluate a/b o.yaml", {"o.yaml": "terms.0.text terms.1.task"}),
        ("merge m.yaml out", {"m.yaml": "base_model models.0.model"}),
    ],
)
def test_missing_files_and_tasks_are_named_before_a_library_loads(words, missing, tmp_path):
    terms = {"terms": [{"text": "gone.jsonl"}, {"task": "gsm9k", "metric": "exact_match"}]}
    files = {
        "study.yaml": {
            **{"base_model": "./gone", "vectors": {"v": {"train": "train-v.yaml"}, "w": "./w"}},
            **{"objective": terms, "test": {"terms": [{"text": "sealed.jsonl"}]}},
        },
        "train-v.yaml": {"name": "v", "base_model": "./gone", "corpus": "gone.jsonl"},
        "o.yaml": terms,
        "m.yaml": {
            **{"merge_method": "task_arithmetic", "base_model": "./gone", "dtype": "float32"},
            "models": [{"model": "./w", "parameters": {"weight": 1}}],
        },
    }
    for name, data in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(data), encoding="utf-8")
    result = process("-c", NO_TORCH, *words.split(), cwd=tmp_path)
    assert result.returncode == 1 and "LOADS" not in result.stderr
    for file, fields in missing.items():
        for field in fields.split():
            fault = "no task named 'gsm9k'" if field.endswith("task") else ".*: no such file or dir"
            assert re.search(rf"{file}:\d+: {field}: {fault}", result.stderr)


def test_every_command_with_libraries_is_one_that_says_so():
    silent = {each.name for each in commands() if not isinstance(each, LoadingCommand)}
    assert silent == WITHOUT_LIBRARIES


@pytest.mark.skipif(sys.platform != "linux", reason="only GNU's OpenMP prints its settings")
@pytest.mark.parametrize("policy", [None, "passive"])
def test_threads_spin_for_a_while_unless_a_user_has_set_how_they_wait(monkeypatch, policy):
    for name in DECIDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")  # printed when the library loads, with torch
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    code = "from optimer_hf.cli import main; main(['schema', 'study'], standalone_mode=False)"
    result = process("-c", f"{code}; import torch")
    count = "0" if policy else SPINS["GOMP_SPINCOUNT"]
    assert f"GOMP_SPINCOUNT = '{count}'" in result.stderr


def test_verbose_shows_the_traceback_of_an_error_and_without_it_is_one_line(tmp_path):
    line = f"error: {tmp_path / 'none.yaml'}: no such file.\n"
    for flags in ([], ["-v"]):
        arguments = ["-m", "optimer_hf", *flags, "search", tmp_path / "none.yaml", tmp_path / "s"]
        result = process(*arguments)
        before = result.stderr.removesuffix(line)
        assert result.returncode == 1 and before != result.stderr
        assert before.startswith("Traceback (most recent call last):\n") == bool(flags)
        assert bool(before) == bool(flags)


def test_the_traceback_of_an_error_has_its_causes():
    @click.command(cls=Program, sections={})
    @click.option("-v", "--verbose", is_flag=True)
    def group(verbose: bool) -> None: ...

    @group.command()
    def fail() -> None:
        try:
            json.loads("{")
        except ValueError as error:
            raise ConfigError("c.json: not valid JSON.") from error

    assert CliRunner().invoke(group, ["fail"]).stderr == "error: c.json: not valid JSON.\n"
    shown = CliRunner().invoke(group, ["-v", "fail"]).stderr
    assert re.search(r"(?s)JSONDecodeError.*direct cause.*ConfigError.*\nerror: c\.json", shown)


def test_the_package_runs_as_a_module_and_knows_its_version():
    result = process("-m", "optimer_hf", "--version")
    assert result.returncode == 0 and "version" in result.stdout


def test_a_shell_completes_commands():
    command = [sys.executable, "-m", "optimer_hf"]
    asked = {"COMP_WORDS": "optimer rep", "COMP_CWORD": "1", "_OPTIMER_COMPLETE": "bash_complete"}
    code = "from optimer_hf.cli import main; main(prog_name='optimer')"
    result = subprocess.run(
        [*command[:1], "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert result.stdout.split() == ["plain,report"]


def test_verbose_lets_the_traceback_of_a_crashed_trial_through():
    logger = logging.getLogger("optimer_hf.searching.trial")
    try:
        for options, shown in ((["-v"], True), ([], False)):
            assert CliRunner().invoke(main, [*options, "schema", "study"]).exit_code == 0
            assert logger.isEnabledFor(logging.DEBUG) is shown
    finally:
        logging.getLogger("optimer_hf").setLevel(logging.NOTSET)
