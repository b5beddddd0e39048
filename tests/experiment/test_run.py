"""The main job on a tiny model through the command line: run, again, kill, go on; bad folders."""

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.comparison.ledger import write_ledger
from optimer_hf.errors import OutputError
from optimer_hf.experiment.marks import Claim, read_claim
from optimer_hf.experiment.run import claim_directory
from optimer_hf.recipes.record import Lock
from tests.support.added_tokens import END, START, TEMPLATE, save_tuned, with_tokens
from tests.support.experiments import run_optimer
from tests.support.warm import start_optimer


def test_a_run_goes_from_corpora_to_a_model_that_generates(finished: Path):
    results = json.loads((finished / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    for name in ("aaa", "xyz"):
        own = rows[f"{name} at 1.0"]["terms"][name]["gain"]
        assert own["low"] > 0, f"the vector {name} does not help its own domain"
    assert {
        "base",
        "uniform average",
        "uniform sum",
        "searched merge",
        "re-targeted to only xyz",
    } <= rows.keys()
    assert rows["searched merge"]["value"] > rows["base"]["value"]
    assert (
        json.loads((finished / "vectors" / "aaa" / "vector.json").read_text())["kind"] == "adapter"
    )
    model = AutoModelForCausalLM.from_pretrained(finished / "merged")
    tokenizer = AutoTokenizer.from_pretrained(finished / "merged")
    generated = model.generate(
        **tokenizer("aa", return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    assert generated.shape[1] == 7
    ledger = json.loads((finished / "ledger.json").read_text())
    assert ledger["train"]["tokens"] == 2048
    assert ledger["search"]["n"] == 7


def test_the_exported_config_gives_the_same_weights_in_unmodified_mergekit(
    finished: Path, tmp_path: Path
):
    command = [
        str(Path(sys.executable).parent / "mergekit-yaml"),
        str(finished / "mergekit_config.yml"),
        str(tmp_path / "out"),
        *("--lora-merge-cache", str(tmp_path / "cache"), "--lora-merge-dtype", "float32"),
    ]
    assert " ".join(command[3:4]) in (finished / "mergekit_config.yml").read_text()
    assert not (finished / "deltas").exists()
    subprocess.run(command, check=True, capture_output=True)
    ours = AutoModelForCausalLM.from_pretrained(finished / "merged", dtype="auto").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    equal = total = 0
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.bfloat16
        ulps = (tensor.view(torch.int16).int() - theirs[name].view(torch.int16).int()).abs()
        equal += (ulps <= 1).sum().item()
        total += tensor.numel()
    assert equal >= 0.995 * total


def test_a_finished_run_does_nothing_and_says_so_at_once(finished_once: Path):
    finished, recipe_dir = finished_once, finished_once.parents[1] / "recipes" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    started = time.perf_counter()
    again = subprocess.run(
        [sys.executable, "-m", "optimer_hf", "run", str(recipe_dir), str(finished)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - started < 10
    assert "nothing to do" in again.stderr
    assert "searched merge" in again.stdout
    assert before == {
        path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()
    }


def test_a_run_that_was_moved_is_not_done_again(finished: Path, recipe_dir: Path, tmp_path: Path):
    names = (
        "results.json",
        "study/trials.jsonl",
        "study/sealed.jsonl",
        "vectors/aaa/training.json",
    )
    before = [(finished / name).read_bytes() for name in names]
    recipe, out = tmp_path / "moved" / "tiny", tmp_path / "moved" / "out"
    recipe.parent.mkdir()
    recipe_dir.rename(recipe)
    finished.rename(out)
    (out / "done.json").unlink()  # otherwise there is nothing to do at once
    again = run_optimer("run", recipe, out)
    assert again.exit_code == 0, again.output
    assert [(out / name).read_bytes() for name in names] == before
    compared = run_optimer("compare", out)
    assert compared.exit_code == 0, compared.output


def test_a_file_that_is_edited_while_a_run_goes_on_is_not_taken_for_one_that_it_read(
    finished: Path, recipe_dir: Path, monkeypatch, caplog
):
    def write_and_edit(*args) -> None:
        write_ledger(*args)
        with (recipe_dir / "study.yaml").open("a") as file:
            file.write("# edited\n")

    (finished / "done.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("optimer_hf.comparison.ledger.write_ledger", write_and_edit)
        assert run_optimer("run", recipe_dir, finished).exit_code == 0
    assert "changed while the run went on" in caplog.text
    caplog.clear()
    assert run_optimer("run", recipe_dir, finished).exit_code == 0
    assert "finished already" not in caplog.text and "changed while" not in caplog.text
    assert run_optimer("run", recipe_dir, finished).exit_code == 0
    assert "finished already, nothing to do" in caplog.text


def test_a_finished_run_notices_other_text_outside_its_folder(
    finished: Path, recipe_dir: Path, corpus_dir: Path, caplog
):
    file = corpus_dir / "aaa.train.jsonl"
    text = file.read_text()
    run_optimer("run", recipe_dir, finished)
    assert "finished already, nothing to do" in caplog.text
    try:
        file.write_text(text.replace("a", "b", 1))
        again = run_optimer("run", recipe_dir, finished)
    finally:
        file.write_text(text)
    assert again.exit_code == 1
    assert "was trained with a different content of corpus under the same name" in again.stderr


def has_file(out: Path, pattern: str) -> bool:
    """Whether a file or directory below `out` matches."""
    return any(out.glob(pattern))


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_an_uninterrupted_one(
    finished: Path, recipe_dir: Path, tmp_path: Path
):
    out = tmp_path / "killed"
    marks = [
        "vectors/aaa/checkpoints/checkpoint-*/trainer_state.json",
        "vectors/xyz/started.json",
        "study/trials.jsonl",
        "study/sealed.jsonl",
    ]
    for mark in marks:
        start_optimer("run", recipe_dir, out).kill_when(partial(has_file, out, mark))
    assert start_optimer("run", recipe_dir, out).wait() == 0
    for name in ("aaa", "xyz"):
        whole, resumed = (
            json.loads((run / "vectors" / name / "training.json").read_text())["training"]["losses"]
            for run in (finished, out)
        )
        assert resumed == pytest.approx(whole, abs=1e-6)
    one, other = (json.loads((run / "results.json").read_text()) for run in (finished, out))
    for row, expected in zip(other["rows"], one["rows"], strict=True):
        assert row["weights"] == pytest.approx(expected["weights"], abs=1e-3)
        assert row["value"] == pytest.approx(expected["value"], abs=1e-4)


def test_the_short_form_is_a_smaller_budget_of_the_same(recipe_dir: Path, tmp_path: Path):
    result = run_optimer("run", recipe_dir, tmp_path / "out", "--short")
    assert result.exit_code == 0, result.output
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["train"]["tokens"] == 512
    assert ledger["search"]["n"] == 5


def test_a_run_with_a_chat_model_gives_its_tokens_to_the_merge(
    recipe_dir: Path, make_base, tmp_path: Path
):
    base, file = make_base("gemma"), recipe_dir / "study.yaml"
    save_tuned(base, recipe_dir / "chat", with_tokens(base.path, [START, END]), seed=1)
    study = yaml.safe_load(file.read_text(encoding="utf-8"))
    study["vectors"]["chat"] = "chat"
    file.write_text(yaml.safe_dump(study | {"vocabulary": "union", "tokenizer_source": "chat"}))
    result = run_optimer("run", "--short", recipe_dir, tmp_path / "out")
    assert result.exit_code == 0, result.output
    lock = Lock.read(tmp_path / "out" / "recipe.lock.json")
    assert {t: each.vectors for t, each in lock.added_tokens.items()} == {
        START: ["chat"],
        END: ["chat"],
    }
    verified = run_optimer("verify", tmp_path / "out/recipe.yaml", tmp_path / "out/merged")
    assert verified.exit_code == 0, verified.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    assert {START, END} <= tokenizer.get_vocab().keys() and tokenizer.chat_template == TEMPLATE


def test_another_budget_does_not_overwrite_a_run(finished: Path, recipe_dir: Path):
    result = run_optimer("run", recipe_dir, finished, "--short")
    assert result.exit_code == 1
    assert "of another budget" in result.output


def test_a_file_of_the_users_beside_a_run_does_not_stop_it(tmp_path: Path):
    claim = Claim(recipe="tiny", short=True)
    with claim_directory(tmp_path, claim):
        (tmp_path / "notes.txt").write_text("x")
    with claim_directory(tmp_path, claim):
        pass
    both = r"found 'tiny' \(--short\), expected 'tiny' \(--short, --tokens 2\)\. Give another"
    with (
        pytest.raises(OutputError, match=both),
        claim_directory(tmp_path, claim.model_copy(update={"tokens": 2})),
    ):
        pass


RACING = """
import json, sys, time
from pathlib import Path
from optimer_hf.errors import OptimerError
from optimer_hf.experiment import marks, run

write = marks.Claim.write

def write_late(claim, path):
    time.sleep(1)  # both have looked by now
    write(claim, path)

marks.Claim.write = write_late
out, name = Path(sys.argv[1]), sys.argv[2]
try:
    with run.claim_directory(out, marks.Claim(recipe=name)):
        time.sleep(1)
        print("ran", name, json.loads((out / "run.json").read_text())["recipe"])
except OptimerError as error:
    print("refused", name, error)
"""


def test_of_two_recipes_started_at_once_in_one_directory_one_is_refused(tmp_path: Path):
    out = tmp_path / "out"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACING, str(out), name], stdout=subprocess.PIPE, text=True
        )
        for name in ("one", "other")
    ]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    ran, refused = said
    name = ran.split()[1]
    assert ran == f"ran {name} {name}"
    assert refused.startswith("refused") and "another process is working in it" in refused
    assert read_claim(out) == Claim(recipe=name)


@pytest.mark.parametrize("lost", ["results.json", "results.md"])
def test_a_run_whose_results_are_lost_is_not_finished(
    finished: Path, recipe_dir: Path, lost: str, caplog
):
    before = (finished / "results.json").read_text()
    (finished / lost).unlink()
    result = run_optimer("run", recipe_dir, finished)
    assert result.exit_code == 0, result.output
    assert "finished already" not in caplog.text
    assert "searched merge" in (finished / "results.md").read_text()
    assert (finished / "results.json").read_text() == before


def test_an_output_directory_with_foreign_files_is_refused(recipe_dir: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    result = run_optimer("run", recipe_dir, out)
    assert result.exit_code == 1
    assert "thesis.tex" in result.output
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_fixed_instruct_like_vector_is_in_every_trial(
    finished: Path, make_base, make_tuned, corpus_dir: Path, tmp_path: Path
):
    base = make_base("gemma")
    study = {
        "base_model": str(base.path),
        "vectors": {
            "aaa": {"source": str(finished / "vectors" / "aaa")},
            "xyz": {"source": str(finished / "vectors" / "xyz")},
            "it": {"source": str(make_tuned(base, "gemma", 7, scale=1e-3)), "fixed": 1.0},
        },
        "objective": {"terms": [{"name": "aaa", "text": str(corpus_dir / "aaa.search.jsonl")}]},
        "search": {"n_trials": 6, "rescore_top": 1},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    result = run_optimer("search", path, tmp_path / "study")
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "study" / "trials.jsonl").read_text().splitlines()
    assert {json.loads(line)["weights"]["it"] for line in lines} == {1.0}


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(recipe_dir: Path, tmp_path: Path):
    out = tmp_path / "out"
    process = start_optimer("run", recipe_dir, out, said=tmp_path / "said.txt")
    deadline = time.monotonic() + 120
    while not has_file(out, "vectors/*/*") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.signal(signal.SIGINT)
    status, said = process.wait(), (tmp_path / "said.txt").read_text()
    assert status == 130, said
    assert f"to resume: optimer run {recipe_dir} {out}" in said
    assert "Traceback" not in said


def test_a_run_leaves_a_report_with_the_training_of_its_vectors(finished: Path):
    text = (finished / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r'<figure id="(\w+)"', text)
    assert {"progress", "weights", "sealed", "cosines", "losses", "norms", "ledger"} <= set(shown)
    record = json.loads((finished / "vectors" / "aaa" / "vector.json").read_text())
    norms = record["training"]["norms"]
    assert len(norms) == len(record["training"]["losses"])
    assert norms[-1] == pytest.approx(record["norm"], rel=0.01)
    compared = run_optimer(
        "compare", finished
    )  # the study of a run goes by the run's directory, too
    assert compared.exit_code == 0 and "searched merge" in compared.stdout
    for folder in (finished, finished / "merged"):
        drawn = {path.name for path in (folder / "figures").iterdir()}
        assert {"captions.json", "progress.png", "weights.png", "sealed.png"} <= drawn
