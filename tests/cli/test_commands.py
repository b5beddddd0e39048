"""cli.py: what a person types and sees; every command on tiny models, and errors as one line."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimer_hf.cli import Group, main
from optimer_hf.errors import ConfigError
from optimer_hf.files.staging import staged_directory, write_text

ROOT = Path(__file__).parents[2]
COMMANDS = ["run", "train", "extract", "convert", "merge", "evaluate", "search"]
COMMANDS += ["retarget", "compare", "recipe", "build", "verify", "validate", "vectors"]
HEAVY = {"torch", "transformers", "lm_eval", "mergekit", "smac", "datasets", "scipy"}


def optimer(*arguments, ok: bool = True):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code == 0) == ok, result.output
    return result


def process(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def pool(make_base, make_tuned):
    base = make_base("llama", torch.float32)
    return base.path, [make_tuned(base, "llama", seed, torch.float32, 0.02) for seed in (1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pool, corpus_dir):
    """A folder with a mergekit YAML of somebody's fine-tunes, and an objective."""
    out = tmp_path_factory.mktemp("folder")
    base, tuned = pool
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in tuned]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": models,
        "dtype": "float32",
    }
    (out / "my-merge.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    terms = [
        {"text": os.path.relpath(corpus_dir / f"{name}.search.jsonl", out)}
        for name in ("aaa", "xyz")
    ]
    (out / "obj.yaml").write_text(yaml.safe_dump({"terms": terms, "limit": 3}), encoding="utf-8")
    return out


def linear_config(pool, weights, **options) -> dict:
    models = [
        {"model": str(p), "parameters": {"weight": w}}
        for p, w in zip(pool[1], weights, strict=True)
    ]
    return {
        "merge_method": "optimer",
        "base_model": str(pool[0]),
        "models": models,
        "dtype": "float32",
    } | options


def expected_weights(pool, weights) -> dict[str, torch.Tensor]:
    base, *tuned = (
        AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (pool[0], *pool[1])
    )
    return {
        name: tensor + sum(w * (t[name] - tensor) for w, t in zip(weights, tuned, strict=True))
        for name, tensor in base.items()
    }


def assert_is_merge(directory: Path, pool, weights) -> None:
    found = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for name, tensor in expected_weights(pool, weights).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


# -- the shell -------------------------------------------------------------------------------------


def test_help_lists_the_commands():
    text = optimer("--help").output
    for name in COMMANDS:
        assert f"  {name} " in text


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_itself(name):
    text = optimer(name, "--help").output
    assert "Usage:" in text and len(text.splitlines()) > 4


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


ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_a_signal_tidies_up_says_how_to_go_on_and_is_the_exit_status(
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
    result = optimer("pull", "a/b", ok=False)
    assert result.exit_code == status
    assert "interrupted. Finished" in result.stderr
    assert result.stderr.endswith("; to go on: optimer pull a/b\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_signals_that_are_ignored_or_of_others_stay_so(monkeypatch):
    found = []
    monkeypatch.setattr(
        "optimer_hf.hub.pull", lambda *_, **__: found.append(signal.getsignal(signal.SIGHUP))
    )
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        CliRunner().invoke(main, ["pull", "a/b"])
        assert found == [signal.SIG_IGN] == [signal.getsignal(signal.SIGHUP)]
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


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
def test_no_token_is_shown_with_the_command_that_goes_on(monkeypatch, given, shown):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimer_hf.hub.pull", interrupted)
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    monkeypatch.setattr(sys, "argv", ["optimer", "pull", "a/b", *given, "--update"])
    result = optimer("pull", "a/b", ok=False)
    assert result.exit_code == 130
    assert result.stderr.endswith(f"to go on: {shown}")


def test_an_input_that_is_not_there_is_told_before_the_libraries_load(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "optimer_hf", "search", "none.yaml", "s"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1 and "error: none.yaml: no such file.\n" in found.stderr
    assert " torch\n" not in found.stderr and " scipy\n" not in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere"], "nowhere: no such recipe folder"),
        (["convert", "none.gguf", "out"], "none.gguf: no such file"),
        (["evaluate", "./none", "obj.yaml"], "no such file or directory"),
        (["compare", "nowhere"], "nowhere: no such directory. `optimer search"),
        (["recipe", ".", "recipe.yaml"], "holds no study"),
        (["extract", "./none", "--base", "./none", "out"], "no such file or directory"),
        (["search", "my-merge.yml", "s"], "Add --objective"),
        (["merge", "obj.yaml", "out"], "obj.yaml:1: unknown field 'limit'"),
        (["merge", "my-merge.yml", "out", "--engine", "native"], "only mergekit can do"),
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


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pull", "--help", "merge"], ["evaluate", "some-model", "merge"]]
)
def test_help_and_bad_inputs_answer_without_importing_torch_or_mergekit(arguments, tmp_path):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['optimer', *{arguments}]\n"
        "try:\n    runpy.run_module('optimer_hf', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    result = process("-c", code)
    assert "Usage:" in result.stdout or "merge: no such file" in result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_size_that_mergekit_cannot_read_is_a_usage_error(folder, tmp_path):
    flags = ["--out-shard-size", "much"]
    result = CliRunner().invoke(main, ["merge", str(folder / "my-merge.yml"), "out", *flags])
    assert result.exit_code == 2 and "cannot read a flag's value (much)" in result.stderr


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
    @click.group(cls=Group)
    @click.option("-v", "--verbose", is_flag=True)
    def group(verbose: bool) -> None: ...

    @group.command()
    def fail() -> None:
        try:
            json.loads("{")
        except ValueError as error:
            raise ConfigError("c.json: not valid JSON.") from error

    assert CliRunner().invoke(group, ["fail"]).stderr == "error: c.json: not valid JSON.\n"
    found = CliRunner().invoke(group, ["-v", "fail"]).stderr
    assert re.search(r"(?s)JSONDecodeError.*direct cause.*ConfigError.*\nerror: c\.json", found)


def test_the_package_runs_as_a_module_and_knows_its_version():
    result = process("-m", "optimer_hf", "--version")
    assert result.returncode == 0 and "version" in result.stdout


def commands(group=main):
    for command in group.commands.values():
        yield from commands(command) if isinstance(command, click.Group) else [command]


@pytest.mark.parametrize("command", [*commands()], ids=lambda command: command.name)
def test_the_help_of_a_command_says_what_each_argument_is(command):
    context = click.Context(command, info_name=command.name)
    for argument in command.get_params(context):
        if isinstance(argument, click.Argument):
            name = argument.make_metavar(context).strip("[].")
            assert name in command.help or set(name) & set("{|}"), (command.name, name)


# -- validate --------------------------------------------------------------------------------------


def test_validate_names_the_kind_of_each_good_file(folder, tmp_path):
    study = {
        "base_model": "a/b",
        "vectors": {"w": {"source": "a/w"}},
        "objective": {"terms": [{"task": "t"}]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    lines = optimer(
        "validate", folder / "my-merge.yml", folder / "obj.yaml", tmp_path / "study.yaml"
    ).stdout
    assert [line.split(": ")[1] for line in lines.splitlines()] == [
        "a valid merge config",
        "a valid objective",
        "a valid study",
    ]


def test_validate_reports_all_bad_files_and_still_the_good_ones(folder, tmp_path):
    (tmp_path / "a.yaml").write_text("terms: []\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text(
        "base_model: a/b\nvectors: {w: {source: a/w}}\nobjectve: 1\n", encoding="utf-8"
    )
    result = optimer(
        "validate", tmp_path / "a.yaml", folder / "obj.yaml", tmp_path / "b.yaml", ok=False
    )
    assert result.exit_code == 1
    assert "obj.yaml: a valid objective" in result.stdout
    assert "a.yaml:1: terms: " in result.stderr and "Did you mean 'objective'?" in result.stderr


def test_validate_tells_all_mistakes_of_a_file_each_with_its_line(tmp_path):
    terms = [{"task": "t", "num_fewshot": 1}, {"task": "t"}]
    study = {
        "base_model": "a/b",
        "vectors": {"w": {"source": "a/w", "bounds": [1.0, 0.0]}, "x": {"train": "t.yaml"}},
        "objective": {"terms": terms, "combine": "wurst"},
        "search": {"seed": -1, "n_trails": 3},
    }
    train = {
        "name": "n",
        "base_model": "a/b",
        "corpus": {"path": "x.jsonl"},
        "lora": {"alpha": 8},
        "trainer": {"learning_rate": "high", "gradient_accumulation_steps": 0},
    }
    for name, data in (("study.yaml", study), ("train.yaml", train)):
        text = yaml.safe_dump(data, sort_keys=False)
        (tmp_path / name).write_text(text, encoding="utf-8")
    result = optimer("validate", tmp_path / "study.yaml", tmp_path / "train.yaml", ok=False)
    lines = result.stderr.removeprefix("error: ").replace(f"{tmp_path}/", "").splitlines()
    assert [line.rpartition(".yaml:")[2][:35] for line in lines] == [
        "5: vectors.w.bounds: bounds [1.0, 0",
        "15: objective.combine: found 'wurst",
        "17: search.seed: found -1. Input sh",
        "18: unknown field 'search.n_trails'",
        "6: lora.alpha: unknown field of Lor",
        "8: trainer.learning_rate: found 'hi",
        "9: trainer.gradient_accumulation_st",
    ]


def test_validate_finds_mistakes_in_a_merge_config(tmp_path):
    (tmp_path / "m.yml").write_text(
        "merge_method: linear\nmodels: [{modle: a/b}]\n", encoding="utf-8"
    )
    assert (
        "models.0: unknown field 'modle'"
        in optimer("validate", tmp_path / "m.yml", ok=False).stderr
    )
    (tmp_path / "m.yml").write_text("merge_method: linaer\n", encoding="utf-8")
    assert "Did you mean 'linear'?" in optimer("validate", tmp_path / "m.yml", ok=False).stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("study.yaml")), ids=lambda path: path.parent.name
)
def test_the_recipes_of_this_repository_are_valid(path):
    optimer("validate", *sorted(path.parent.glob("*.yaml")))


def test_validate_names_local_files_that_are_not_there(tmp_path):
    (tmp_path / "here.jsonl").touch()
    (tmp_path / "study.yaml").write_text(
        "base_model: a/b\nvectors: {x: {source: ./x}, y: {source: c/y}}\n"
        "objective:\n  system_instruction: /no_think\n"
        "  terms: [{text: here.jsonl}, {text: gone.jsonl}]\n"
        "test:\n  system_instruction: /no_think\n"
        "  include_path: tasks\n  terms: [{task: t, metric: acc}]\n",
        encoding="utf-8",
    )
    (tmp_path / "train.yaml").write_text(
        "name: x\nbase_model: a/b\ncorpus: {path: corpus.jsonl}\nmax_tokens: 1_024\n",
        encoding="utf-8",
    )
    (tmp_path / "m.yml").write_text(
        "merge_method: linear\nbase_model: ./base\nmodels:\n"
        "- {model: ./tuned, parameters: {weight: 1}}\n"
        "- {model: org/a+org/b, parameters: {weight: 1}}\n",
        encoding="utf-8",
    )
    found = optimer(
        "validate", *(tmp_path / name for name in ("study.yaml", "train.yaml", "m.yml"))
    )
    assert found.stdout.replace(f"{tmp_path}/", "").splitlines() == [
        "study.yaml: a valid study",
        "study.yaml:2: vectors.x.source: x: no such file or directory.",
        "study.yaml:5: objective.terms.1.text: gone.jsonl: no such file or directory.",
        "study.yaml:8: test.include_path: tasks: no such file or directory.",
        "train.yaml: a valid train config",
        "train.yaml:3: corpus.path: corpus.jsonl: no such file or directory.",
        "m.yml: a valid merge config",
        "m.yml:2: base_model: base: no such file or directory.",
        "m.yml:4: models.0.model: tuned: no such file or directory.",
    ]
    (tmp_path / "obj.yaml").write_text("terms: [{text: gone.jsonl}]\n", encoding="utf-8")
    for arguments in (["study.yaml"], ["m.yml", "--objective", tmp_path / "obj.yaml"]):
        found = optimer("search", tmp_path / arguments[0], *arguments[1:], tmp_path / "s", ok=False)
        assert "gone.jsonl: no such file or directory." in found.stderr
        assert f"{arguments[0]}:2: " in found.stderr
        assert not (tmp_path / "s").exists()
    found = optimer("validate", "--strict", tmp_path / "study.yaml", tmp_path / "m.yml", ok=False)
    assert found.stdout == ""
    assert found.stderr.count("no such file or directory.") == 5


def test_strict_names_wrong_fields_and_absent_files_together(tmp_path):
    (tmp_path / "here.jsonl").touch()
    files = {
        "study.yaml": "base_model: ./base\nvectors: {x: {source: ./x}, y: {train: y.yaml}}\n"
        "objective:\n  limit: 0\n  terms: [{text: here.jsonl}, {text: gone.jsonl}]\n"
        "baselines: {models: {m: ./m}}\n",
        "train.yaml": "name: x\nbase_model: ./base\n"
        "mixture: [{path: gone.jsonl, share: 1}]\nmax_tokens: 0\n",
        "other.yaml": "name: x\nbase_model: ./base\ncorpus: {path: c.jsonl}\nlora: {x: 1}\n",
        "obj.yaml": "terms: [{text: gone.jsonl, weight: x}]\ninclude_path: tasks\n",
        "m.yml": "merge_method: linear\nmodels:\n- {model: ./tuned, parameters: {wight: 1}}\n"
        "- {model: ./base+./adapter, parameters: {weight: 1}}\n- {model: 5}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = optimer("validate", "--strict", *(tmp_path / name for name in files), ok=False)
    lines = found.stderr.removeprefix("error: ").replace(f"{tmp_path}/", "").splitlines()
    absent = [line for line in lines if line.endswith(": no such file or directory.")]
    assert [line.rpartition(": no ")[0] for line in absent] == [
        "study.yaml:1: base_model: base",
        "study.yaml:2: vectors.x.source: x",
        "study.yaml:2: vectors.y.train: y.yaml",
        "study.yaml:5: objective.terms.1.text: gone.jsonl",
        "study.yaml:6: baselines.models.m: m",
        "train.yaml:2: base_model: base",
        "train.yaml:3: mixture.0.path: gone.jsonl",
        "other.yaml:2: base_model: base",
        "other.yaml:3: corpus.path: c.jsonl",
        "obj.yaml:1: terms.0.text: gone.jsonl",
        "obj.yaml:2: include_path: tasks",
        "m.yml:3: models.0.model: tuned",
        "m.yml:4: models.1.model.0: base",
        "m.yml:4: models.1.model.1: adapter",
    ]
    wrong = [line.split(" ")[1] for line in lines if line not in absent]
    assert wrong == [
        *("objective.limit:", "max_tokens:", "lora.x:", "terms.0.weight:"),
        *("models.2.model:", "models.0.parameters:"),
    ]
    plain = optimer("validate", *(tmp_path / name for name in files), ok=False)
    assert "no such file" not in plain.stderr


# -- the commands ----------------------------------------------------------------------------------


def test_a_mergekit_yaml_of_base_plus_adapter_is_searched(
    folder, make_base, make_adapter, tmp_path
):
    base = make_base("llama", torch.float32)
    adapter = make_adapter(base, 1)
    config = yaml.safe_load((folder / "my-merge.yml").read_text())
    config["models"] = [{"model": f"{base.path}+{adapter}", "parameters": {"weight": 0.5}}]
    path = tmp_path / "m.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    objective = ("--objective", folder / "obj.yaml")
    result = optimer("search", path, tmp_path / "s", *objective, "--n-trials", "3")
    (model,) = yaml.safe_load(result.stdout)["models"]
    assert model["model"] == str(adapter)


def test_a_mergekit_yaml_is_searched_and_comes_back_as_a_yaml_with_weights(folder, pool, tmp_path):
    result = optimer(
        "search",
        folder / "my-merge.yml",
        tmp_path / "s",
        "--objective",
        folder / "obj.yaml",
        "--n-trials",
        "4",
    )
    config = yaml.safe_load(result.stdout)
    assert config["merge_method"] == "optimer"
    assert [list(model["parameters"]) for model in config["models"]] == [["weight"], ["weight"]]
    assert len((tmp_path / "s" / "trials.jsonl").read_text().splitlines()) >= 4
    weights = [model["parameters"]["weight"] for model in config["models"]]
    (tmp_path / "s" / "printed.yml").write_text(result.stdout, encoding="utf-8")
    optimer("merge", tmp_path / "s" / "printed.yml", tmp_path / "merged")
    assert_is_merge(tmp_path / "merged", pool, weights)

    assert "without recipe.yaml" in optimer("build", tmp_path, tmp_path / "b", ok=False).stderr
    optimer("build", tmp_path / "s", tmp_path / "built")  # its recipe.yaml
    assert_is_merge(tmp_path / "built", pool, weights)
    assert (
        "the weights are those of"
        in optimer("verify", tmp_path / "s" / "recipe.yaml", tmp_path / "built").stdout
    )
    assert "recipe" in optimer("validate", tmp_path / "s" / "recipe.yaml").stdout

    again = optimer(
        *("search", folder / "my-merge.yml", tmp_path / "s", "--objective", folder / "obj.yaml"),
        *("--n-trials", "4", "--format", "json"),
    )
    assert list(json.loads(again.stdout)["weights"].values()) == weights


def test_recipe_of_a_study_also_comes_as_a_config_for_unmodified_mergekit(folder, pool, tmp_path):
    optimer(
        "search",
        folder / "my-merge.yml",
        tmp_path / "s",
        "--objective",
        folder / "obj.yaml",
        "--n-trials",
        "2",
    )
    optimer("recipe", tmp_path / "s", tmp_path / "r" / "recipe.yaml", "--vanilla")
    recipe = yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load((tmp_path / "r" / "mergekit_config.yml").read_text(encoding="utf-8"))
    assert config["merge_method"] == "linear" and config["parameters"]["normalize"] is False
    optimer("merge", tmp_path / "r" / "mergekit_config.yml", tmp_path / "merged")
    assert_is_merge(
        tmp_path / "merged", pool, [entry["weight"] for entry in recipe["vectors"].values()]
    )


def test_verify_refuses_a_model_that_was_changed(folder, tmp_path):
    optimer(
        "search",
        folder / "my-merge.yml",
        tmp_path / "s",
        "--objective",
        folder / "obj.yaml",
        "--n-trials",
        "1",
    )
    recipe = tmp_path / "s" / "recipe.yaml"
    assert (
        "records no built model" in optimer("verify", recipe, tmp_path / "built", ok=False).stderr
    )
    optimer("build", recipe, tmp_path / "built")
    (weights,) = (tmp_path / "built").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "sha256 differs" in optimer("verify", recipe, tmp_path / "built", ok=False).stderr


@pytest.mark.parametrize("engine", ["native", "mergekit"])
def test_merge_writes_the_weighted_sum_with_either_engine(pool, tmp_path, engine):
    (tmp_path / "m.yml").write_text(
        yaml.safe_dump(linear_config(pool, [0.3, 0.6])), encoding="utf-8"
    )
    result = optimer("merge", tmp_path / "m.yml", tmp_path / "out", "--engine", engine)
    assert ("the streaming writer" if engine == "native" else "mergekit") in result.stdout
    assert_is_merge(tmp_path / "out", pool, [0.3, 0.6])


def test_merge_runs_other_methods_and_takes_the_flags_of_mergekit(folder, pool, tmp_path):
    result = process(
        "-m",
        "optimer_hf",
        "merge",
        folder / "my-merge.yml",
        tmp_path / "out",
        "--copy-tokenizer",
        "--quiet",
    )
    assert result.returncode == 0, result.stderr
    assert "mergekit" in result.stdout
    assert_is_merge(tmp_path / "out", pool, [0.5, 0.5])


def test_merge_does_not_write_over_files(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in optimer("merge", folder / "my-merge.yml", tmp_path, ok=False).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_extract_writes_the_difference_as_a_delta_directory(pool, tmp_path):
    base, tuned = pool
    result = optimer(
        "extract", tuned[0], "--base", base, tmp_path / "v", "--name", "first", "--dtype", "float32"
    )
    assert "delta, norm" in result.stdout
    record = json.loads((tmp_path / "v" / "vector.json").read_text(encoding="utf-8"))
    assert record["name"] == "first" and record["kind"] == "delta"
    stored = {}
    for file in (tmp_path / "v").glob("*.safetensors"):
        stored |= load_file(file)
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (base, tuned[0])
    )
    assert stored
    for name, delta in stored.items():
        torch.testing.assert_close(delta, after[name] - before[name])


def test_extract_says_what_int8_costs(pool, tmp_path):
    base, tuned = pool
    result = optimer("extract", tuned[0], "--base", base, tmp_path / "v", "--dtype", "int8")
    record = json.loads((tmp_path / "v" / "vector.json").read_text(encoding="utf-8"))
    assert f"stored in int8 with a relative error of {100 * record['relative_error']:.3f} %" in (
        result.stdout
    )
    assert (record["dtype"], record["block_size"]) == ("int8", 64)


def test_extract_takes_an_adapter_that_is_no_lora_through_peft(
    pool, make_adapter, make_base, tmp_path
):
    base, _ = pool
    adapter = make_adapter(make_base("llama", torch.float32), 5, use_dora=True)
    refused = optimer("extract", adapter, "--base", base, tmp_path / "v", ok=False)
    assert "--from-adapter" in refused.stderr
    refused = optimer("extract", base, "--from-adapter", "--base", base, tmp_path / "v", ok=False)
    assert "is no adapter" in refused.stderr and "Traceback" not in refused.stderr
    optimer("extract", adapter, "--from-adapter", "--base", base, tmp_path / "v")
    assert json.loads((tmp_path / "v" / "vector.json").read_text())["kind"] == "delta"


def test_vectors_shows_a_pool_and_fails_where_one_cannot_be_merged(pool, make_base, tmp_path):
    base, tuned = pool
    result = optimer("vectors", *tuned, "--base", base)
    assert result.stdout.count("can be merged into this base") == 2
    assert "| cosine |" in result.stdout and "survives bfloat16" in result.stdout
    other = make_base("gemma").path
    data = json.loads(
        optimer("vectors", tuned[0], other, "--base", base, "--format", "json", ok=False).stdout
    )
    assert list(data["norms"]) == [tuned[0].name]
    assert list(data["refused"]) == [other.name]


def test_a_merge_says_how_much_of_its_delta_survives(folder, pool, tmp_path, caplog):
    config = yaml.safe_load((folder / "my-merge.yml").read_text(encoding="utf-8"))
    config |= {"merge_method": "optimer", "out_dtype": "bfloat16"}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with caplog.at_level("INFO", logger="optimer_hf"):
        optimer("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert "of the merged delta survives bfloat16" in caplog.text


def test_evaluate_prints_scores_as_text_and_as_json(folder, pool):
    text = optimer("evaluate", pool[0], folder / "obj.yaml", "--dtype", "float32").stdout
    data = json.loads(
        optimer(
            "evaluate", pool[0], folder / "obj.yaml", "--dtype", "float32", "--format", "json"
        ).stdout
    )
    assert set(data) == {"aaa", "xyz"} and data["aaa"]["n_items"] == 3
    assert f"aaa: bits_per_byte {data['aaa']['score']:.4f} on 3 items (limited)" in text


def test_compare_without_a_sealed_test_says_what_is_missing(folder, tmp_path):
    optimer(
        "search",
        folder / "my-merge.yml",
        tmp_path / "s",
        "--objective",
        folder / "obj.yaml",
        "--n-trials",
        "1",
    )
    assert "no `test:` section" in optimer("compare", tmp_path / "s", ok=False).stderr


def test_a_study_is_searched_and_compared(folder, pool, corpus_dir, tmp_path):
    study = {
        "base_model": str(pool[0]),
        "dtype": "float32",
        "vectors": {f"v{index}": {"source": str(path)} for index, path in enumerate(pool[1])},
        "objective": {"terms": [{"text": str(corpus_dir / "aaa.search.jsonl")}], "limit": 3},
        "test": {"terms": [{"text": str(corpus_dir / "aaa.test.jsonl")}]},
        "search": {"n_trials": 5, "rescore_top": 1},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    optimer("search", tmp_path / "study.yaml", tmp_path / "s")
    optimer("recipe", tmp_path / "s", tmp_path / "before" / "recipe.yaml")
    text = optimer("compare", tmp_path / "s").stdout
    data = json.loads(optimer("compare", tmp_path / "s", "--format", "json").stdout)
    names = [row["name"] for row in data["rows"]]
    assert names[0] == "base" and "searched merge" in names
    assert all(f"| {name} |" in text for name in names)
    optimer("recipe", tmp_path / "s", tmp_path / "after" / "recipe.yaml")
    scores = [
        yaml.safe_load((tmp_path / when / "recipe.yaml").read_text(encoding="utf-8"))["scores"]
        for when in ("before", "after")
    ]
    assert "sealed" not in scores[0]
    assert scores[1]["sealed"]["verdicts"] == data["verdicts"]


def test_an_objective_beside_a_study_that_has_its_own_is_refused(folder, tmp_path):
    (tmp_path / "study.yaml").write_text("base_model: a/b\n", encoding="utf-8")
    arguments = [
        "search",
        tmp_path / "study.yaml",
        tmp_path / "s",
        "--objective",
        folder / "obj.yaml",
    ]
    assert "has its own objective" in optimer(*arguments, ok=False).stderr


# -- fronts, other objectives, workers -------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(folder):
    study = folder / "two-terms"
    result = optimer(
        *("search", folder / "my-merge.yml", study, "--objective", folder / "obj.yaml"),
        *("--n-trials", 6, "--workers", 2),
    )
    return study, result


def test_search_prints_front_and_ledger_beside_the_merge_config(searched):
    _, result = searched
    assert yaml.safe_load(result.stdout)["merge_method"] == "optimer"
    assert "Pareto front" in result.stderr and "| pick | trial | aaa" in result.stderr
    assert "search: n 6, items 36, tokens" in result.stderr
    assert re.search(r"minus the base: \+\d+\.\d\d % \[[+-]\d+\.\d\d, \+\d+\.\d\d\]", result.stderr)
    assert "minus the next best, trial" in result.stderr


def test_a_point_of_the_front_becomes_a_recipe(searched, tmp_path):
    study, _ = searched
    optimer("recipe", study, tmp_path / "recipe.yaml", "--pick", 1)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    trials = [json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines()]
    search_trials = [trial for trial in trials if trial["fidelity"] == "search"]
    best = min(search_trials, key=lambda t: sum(a for a, _ in t["terms"]["aaa"]["items"]))
    assert recipe["study"]["incumbent"] == best["number"]
    assert recipe["ledger"]["search"]["n"] == 6
    again = optimer("recipe", study, tmp_path / "recipe.yaml", "--pick", 1)
    assert "recipe.lock.json, optimer.yml" in again.stderr
    theirs = tmp_path / "theirs"
    for name in ("optimer.yml", "notes.yaml"):
        write_text(theirs / name, "merge_method: ties")
    for name, lost in (("recipe.yaml", "optimer.yml"), ("notes.yaml", "notes.yaml")):
        refused = optimer("recipe", study, theirs / name, ok=False)
        assert f"{lost}: exists and was not written with a recipe" in refused.stderr
    assert {path.read_text() for path in theirs.iterdir()} == {"merge_method: ties\n"}
    result = optimer("recipe", study, tmp_path / "recipe.yaml", "--pick", 99, ok=False)
    assert "--pick 99: the front of" in result.stderr


def test_a_figure_that_cannot_be_written_is_refused_before_anything_is_scored(searched, tmp_path):
    (tmp_path / "file").write_text("mine")
    figure = tmp_path / "file" / "x.png"
    result = optimer("compare", searched[0], "--figure", figure, ok=False)
    assert "file: cannot be made a directory" in result.stderr


@pytest.mark.parametrize("text", ["x", "0", "-5", "1e6"])
def test_tokens_that_are_no_number_are_refused(tmp_path, text):
    assert f"--tokens '{text}': expected a number" in (
        optimer("run", tmp_path, "--tokens", text, ok=False).stderr
    )


def test_another_objective_is_answered_from_the_record_and_verified(searched, tmp_path):
    study, _ = searched
    target = tmp_path / "target.yaml"
    terms = [{"text": "xyz.search.jsonl", "weight": 1.0}]
    target.write_text(yaml.safe_dump({"terms": terms}), encoding="utf-8")
    before = (study / "trials.jsonl").read_bytes()
    text = optimer("retarget", study, target).stdout
    assert "predicted: value" in text and "xyz: gain" in text
    assert re.search(r"weights: \S+ [\d.]+, \S+ [\d.]+\n", text)
    found = json.loads(
        optimer(
            *("retarget", study, target, tmp_path / "new", "--n-trials", 1, "--format", "json")
        ).stdout
    )
    assert found["verified"]["ledger"]["search"]["n"] == 7
    assert (study / "trials.jsonl").read_bytes() == before
    lines = (tmp_path / "new" / "trials.jsonl").read_text().splitlines()
    assert json.loads(lines[6])["weights"] == found["prediction"]["weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retarget", ".", ".", "--n-trials", "3"), "OUT and --n-trials go together"),
        (
            ("retarget", ".", ".", "O", "--n-trials", "3", "--workers", "2", "--scheduler", "x"),
            "--workers starts a cluster and --scheduler uses one",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message):
    assert message in optimer(*arguments, ok=False).stderr


def test_a_shell_completes_commands():
    command = [sys.executable, "-m", "optimer_hf"]
    asked = {"COMP_WORDS": "optimer rep", "COMP_CWORD": "1", "_OPTIMER_COMPLETE": "bash_complete"}
    code = "from optimer_hf.cli import main; main(prog_name='optimer')"
    found = subprocess.run(
        [*command[:1], "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert found.stdout.split() == ["plain,report"]


def test_verbose_lets_the_traceback_of_a_crashed_trial_through():
    logger = logging.getLogger("optimer_hf.searching.pool")
    try:
        for options, shown in ((["-v"], True), ([], False)):
            assert CliRunner().invoke(main, [*options, "schema", "study"]).exit_code == 0
            assert logger.isEnabledFor(logging.DEBUG) is shown
    finally:
        logging.getLogger("optimer_hf").setLevel(logging.NOTSET)
