"""baselines.py: other merges, random vectors and mixtures beside the searched merge, all real."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from optimer_hf.comparison.baselines import list_models, write_random_like
from optimer_hf.comparison.results_file import results_of
from optimer_hf.comparison.sealed import SCALED, compare
from optimer_hf.comparison.tables import intervals_to_markdown, to_markdown
from optimer_hf.errors import ConfigError, StudyError
from optimer_hf.files.digest import digest
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import weight_digests
from optimer_hf.report.page import write_sealed_figure
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.config import SCALE_TRIALS, Baselines, StudyConfig
from optimer_hf.study.directory import load_study
from optimer_hf.vectors.delta import measure_norms
from optimer_hf.vectors.opening import open_vector
from tests.support.experiments import run_optimer
from tests.support.landscapes import FunctionPool, config_of, failing_at, no_pool_for
from tests.support.tiny import whole_delta

ALL = {"merge_methods": ["ties", "dare_ties", "model_stock"], "random_vectors": True}


def deltas(vector, base):
    return {name: whole_delta(vector, base, name).float() for name in sorted(vector.names)}


# -- random vectors --------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["adapter", "checkpoint"])
def test_a_random_vector_has_the_norm_of_every_tensor_and_no_direction_in_common(
    stored, make_base, make_adapter, make_tuned, tmp_path
):
    base = make_base("gemma", torch.float32)
    path = make_adapter(base, 0) if stored == "adapter" else make_tuned(base, "gemma", 0)
    real = open_vector("v", str(path), base)
    write_random_like(real, base, tmp_path / "random", seed=3)
    noise = open_vector("v", str(tmp_path / "random"), base)
    assert noise.kind == ("adapter" if stored == "adapter" else "delta")
    drawn, expected = deltas(noise, base), deltas(real, base)
    for name, delta in expected.items():
        tolerance = 1e-5 if stored == "adapter" else 3e-3  # stored in bfloat16
        assert drawn[name].norm().item() == pytest.approx(delta.norm().item(), rel=tolerance), name
        if stored == "adapter":
            rank = torch.linalg.matrix_rank(drawn[name].double(), rtol=1e-5)
            assert rank == torch.linalg.matrix_rank(delta.double(), rtol=1e-5)
    flat = [torch.cat([delta.flatten() for delta in side.values()]) for side in (drawn, expected)]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert abs(cosine) < 6 / len(flat[0]) ** 0.5 + 0.02
    assert measure_norms(noise, Checkpoint(base.path)) == pytest.approx(
        measure_norms(real, Checkpoint(base.path)), rel=3e-3
    )


def test_a_seed_fixes_a_random_vector(make_base, make_adapter, tmp_path):
    base = make_base("gemma", torch.float32)
    real = open_vector("v", str(make_adapter(base, 0)), base)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_like(real, base, tmp_path / name, seed=seed)
    a, b, c = (deltas(open_vector("v", str(tmp_path / n), base), base) for n in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_an_adapter_with_more_than_linear_factors_becomes_a_delta(
    make_base, make_adapter, tmp_path
):
    base = make_base("gemma", torch.float32)
    path = make_adapter(base, 0, modules_to_save=["norm"])
    write_random_like(open_vector("v", str(path), base), base, tmp_path / "random", seed=0)
    assert open_vector("v", str(tmp_path / "random"), base).kind == "delta"


# -- rows ------------------------------------------------------------------------------------------


@pytest.fixture
def real_study(make_base, make_adapter, corpus_dir, tmp_path):
    base = make_base("gemma")

    def terms(split):
        return [
            {"name": name, "text": str(corpus_dir / f"{name}.{split}.jsonl")}
            for name in ("aaa", "xyz")
        ]

    config = StudyConfig.model_validate(
        {
            "base_model": str(base.path),
            "vectors": {
                name: {"source": str(make_adapter(base, n))} for n, name in enumerate("ab")
            },
            "objective": {"terms": terms("search"), "limit": 3},
            "test": {"terms": terms("test")},
            "search": {"n_trials": 5, "rescore_top": 1},
            "baselines": ALL,
        }
    )
    return search(config, tmp_path / "study")


def test_mergekits_methods_and_random_vectors_stand_beside_the_merge(
    real_study, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    relative = replace(real_study, directory=Path("study"))  # as `optimer compare study` has it
    comparison = compare(relative)
    names = [row.title for row in comparison.rows]
    assert names[-5:] == [
        "ties",
        "dare_ties",
        "model_stock",
        "random vectors of equal norm",
        "searched merge",
    ]
    assert not (real_study.directory / "scratch").exists()
    scores = [row.scores["aaa"].items for row in comparison.rows[-5:]]
    assert len({json.dumps(items) for items in scores}) == 5
    assert not any(row.chosen_after_seal for row in comparison.rows)
    again = compare(real_study, pool=lambda config: pytest.fail("everything is scored already"))
    assert again == comparison


def test_a_ties_row_scores_what_mergekit_wrote(real_study, tmp_path):
    from optimer_hf.models.resolve import resolve_base

    ties = list_models(real_study)[0]
    (source,) = ties.make(tmp_path / "scratch").values()
    base = resolve_base(real_study.config.base_model)
    vector = open_vector("ties", source, base)
    resident = ResidentModel(base, [vector], dtype="bfloat16")
    resident.set_weights({"ties": 1.0})
    written = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    for name, tensor in resident.model.state_dict().items():
        torch.testing.assert_close(
            tensor.float(), written[name].bfloat16().float(), rtol=1e-2, atol=1e-6
        )


def test_the_seed_of_the_search_draws_random_vectors_and_the_masks_of_dare(real_study, tmp_path):
    def built(seed, folder):
        config = real_study.config.model_copy(
            update={"search": real_study.config.search.model_copy(update={"seed": seed})}
        )
        directories = {}
        for model in list_models(replace(real_study, config=config)):
            if model.title in ("dare_ties", "random vectors of equal norm"):
                directories |= model.make(tmp_path / folder)
            else:
                kept.append(model.weights)
        return {key: digest(weight_digests(Path(path))) for key, path in directories.items()}

    kept = []
    first, again, other = built(0, "first"), built(0, "again"), built(1, "other")
    assert len(first) == 3 and first == again
    assert not set(first) & set(other), "scores of one seed are not read as those of another"
    assert not set(first.values()) & set(other.values())
    assert kept[:2] == kept[-2:], "TIES and Model Stock draw nothing"


def test_other_searches_and_models_become_rows(make_base, make_adapter, tmp_path):
    changes = {
        "test": {"terms": [{"task": "t_test", "name": "t", "metric": "loss"}]},
        "baselines": {
            "searches": {
                "best of 8 random weights": {"surrogate": "random", "n_trials": 8, "limit": 2}
            },
            "models": {"mixture CPT": "you/mixture"},
        },
    }
    study = search(config_of(**changes), tmp_path / "s", runner=InProcess(FunctionPool))
    comparison = compare(study, pool=FunctionPool)
    names = [row.title for row in comparison.rows]
    assert names[-3:] == ["best of 8 random weights", "mixture CPT", "searched merge"]
    (other,) = (tmp_path / "s" / "searches").glob("best-of-8-random-weights-*")
    assert len((other / "trials.jsonl").read_text().splitlines()) == 8 + 4
    (weight,) = comparison.row("model", "mixture CPT").weights.values()
    assert weight == 1.0
    assert compare(study, pool=no_pool_for("everything")) == comparison


def test_no_two_models_of_baselines_are_held_at_once(tmp_path):
    alive = weakref.WeakSet()
    held = []

    class Pool(FunctionPool):
        def __init__(self, config):
            held.append(len(alive))
            super().__init__(config)
            alive.add(self)

    config = config_of(**SEALED, baselines={"models": {name: f"you/{name}" for name in "abc"}})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    compare(study, pool=Pool)
    assert held == [0, 0, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_figure_shows_every_row(suffix, tmp_path):
    changes = {"test": {"terms": [{"task": "t_test", "name": "t", "metric": "loss"}]}}
    study = search(config_of(**changes), tmp_path / "s", runner=InProcess(FunctionPool))
    comparison = compare(study, pool=FunctionPool)
    file = tmp_path / f"figure.{suffix}"
    write_sealed_figure(comparison, file)
    assert file.stat().st_size > 5000
    if suffix == "svg":
        for row in comparison.rows[1:]:
            assert row.title in file.read_text()
        assert "chosen after" not in file.read_text()
        late = replace(comparison.rows[1], kind="model", subject="m" * 60, chosen_after_seal=True)
        rows = [late if row.kind == "average" else row for row in comparison.rows]
        write_sealed_figure(replace(comparison, rows=rows), file)
        assert f"{'m' * 32}… *" in file.read_text()
        assert "* chosen after the seal was opened" in file.read_text()


# -- mixtures --------------------------------------------------------------------------------------


def test_a_run_trains_the_mixtures_it_compares_with(recipe_dir, tmp_path):
    file = recipe_dir / "study.yaml"
    study = yaml.safe_load(file.read_text())
    study["baselines"] = {
        "mixtures": {
            "uniform mixture": {"scale": "searched"},
            "uniform mixture, one budget": {"budget": "one"},
            "found ratios": {"shares": "searched"},
        }
    }
    file.write_text(yaml.safe_dump(study))
    out = tmp_path / "run"
    result = run_optimer("run", recipe_dir, out)
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["uniform mixture"]["value"] > 0, "it was trained on what the test asks for"
    records = {
        path.name[:-7]: json.loads((path / "training.json").read_text())
        for path in (out / "mixtures").iterdir()
    }
    assert records["uniform-mixture"]["training"]["n_tokens"] == 2048
    assert records["uniform-mixture--one-budget"]["training"]["n_tokens"] == 1024
    parts = records["found-ratios"]["corpus"]["parts"]
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    weights = {name: max(v["weight"], 0) for name, v in recipe["vectors"].items()}
    for part, name in zip(parts, [n for n, w in weights.items() if w > 0], strict=True):
        share = weights[name] / sum(weights.values())
        assert part["n_tokens"] / 2048 == pytest.approx(share, abs=32 / 2048)
    assert (out / "figures" / "sealed.png").exists()
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["mixtures"]["n"] == 3 and ledger["mixtures"]["tokens"] == 2048 + 1024 + 2048
    check_scaled_mixture(out, rows)
    check_rows_of_trained_mixtures(out, rows)


def check_scaled_mixture(out: Path, rows) -> None:
    """The scale of a mixture is the best of a search of its own over the items of the search."""
    (title,) = (name for name in rows if name.startswith("uniform mixture at its best scale, "))
    (scale,) = rows[title]["weights"].values()
    (directory,) = (out / "study" / "searches").glob("scale-uniform-mixture-*")
    study = load_study(directory)
    assert len(study.trials) == SCALE_TRIALS and study.best_trial.weights == {SCALED: scale}
    assert [term.label for term in study.config.objective.terms] == ["aaa", "xyz", "mix"]
    assert title == f"uniform mixture at its best scale, {scale:g}"


def check_rows_of_trained_mixtures(out: Path, rows) -> None:
    """A later comparison has the rows of all mixtures, with their models there or not."""
    names = [name for name in rows if name.startswith(("uniform mixture", "mixture: found ratios"))]
    assert len(names) == 4
    other = f"mixed={out / 'vectors' / 'aaa'}"
    for is_there in (True, False):
        if not is_there:
            (out / "mixtures").rename(out / "elsewhere")
        result = run_optimer("compare", out, "--model", other)
        assert result.exit_code == 0, result.output
        missing = [name for name in [*names, "mixed"] if f"{name} " not in result.stdout]
        assert not missing, result.stdout


def test_a_mixture_that_nobody_has_trained_is_left_out_with_a_warning(tmp_path, caplog):
    study = search(
        config_of(**SEALED, baselines={"mixtures": {"m": {}}}),
        tmp_path / "s",
        runner=InProcess(FunctionPool),
    )
    assert all(row.kind != "mixture" for row in compare(study, pool=FunctionPool).rows)
    assert "mixture 'm' is left out, because it is not trained; `optimer run`" in caplog.text


def test_mixtures_of_vectors_that_are_not_trained_here_are_refused(recipe_dir, tmp_path):
    file = recipe_dir / "study.yaml"
    study = yaml.safe_load(file.read_text())
    study["vectors"]["xyz"] = {"source": "you/xyz"}
    study["baselines"] = {"mixtures": {"uniform": {}}}
    file.write_text(yaml.safe_dump(study))
    result = run_optimer("run", recipe_dir, tmp_path / "run")
    assert result.exit_code == 1
    assert "vector 'xyz' is not trained here with max_tokens" in result.output
    with pytest.raises(ValueError, match="no vector is called 'q'"):
        config_of(baselines={"mixtures": {"m": {"shares": {"q": 1.0}}}})


def test_a_model_of_the_command_line_needs_a_name(tmp_path):
    search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))
    result = run_optimer("compare", tmp_path / "s", "--model", "nonsense")
    assert result.exit_code == 1 and "expected NAME=MODEL" in result.output


# -- honesty ---------------------------------------------------------------------------------------


SEALED = {"test": {"terms": [{"task": "t_test", "name": "t", "metric": "loss"}]}}


@pytest.mark.parametrize("name", ["base", "searched merge", "w at 1.0", "re-targeted to q"])
def test_a_model_cannot_take_the_name_of_another_row(name, tmp_path):
    retarget = {"q": {"t": 1.0}}
    study = search(
        config_of(**SEALED, retarget=retarget), tmp_path / "s", runner=InProcess(FunctionPool)
    )
    joined = study.config.model_copy(update={"baselines": Baselines(models={name: "you/model"})})
    place = rf"baselines\.models\.{name}: '{name}' is the title of another row"
    with pytest.raises(ConfigError, match=place):
        compare(replace(study, config=joined), pool=no_pool_for("nothing"))
    with pytest.raises(ValueError, match="two are called 'm'"):
        config_of(baselines={"models": {"m": "you/m"}, "mixtures": {"m": {}}})


def test_what_joins_after_the_seal_was_opened_is_marked_everywhere(tmp_path):
    study = search(config_of(**SEALED), tmp_path / "s", runner=InProcess(FunctionPool))
    compare(study, pool=FunctionPool)
    changes = {"models": {"later": "you/model"}, "random_vectors": False}
    later = search(
        config_of(**SEALED, baselines=changes), tmp_path / "s", runner=InProcess(FunctionPool)
    )
    comparison = compare(later, pool=FunctionPool)
    marked = [row.title for row in comparison.rows if row.chosen_after_seal]
    assert marked == ["later"]
    for text in (to_markdown(comparison), intervals_to_markdown(comparison)):
        assert "later (chosen after the seal was opened)" in text
    rows = {row.name: row for row in results_of(comparison).rows}
    assert rows["searched merge"].merge_minus.difference == 0.0
    assert rows["searched merge"].merge_minus.low is None, "a row beside itself has no interval"
    assert rows["later"].merge_minus.difference == pytest.approx(
        rows["searched merge"].value - rows["later"].value
    )


def test_rows_of_another_sealed_test_do_not_join_a_table(tmp_path):
    def pool_of(test: str):
        return type("Pool", (FunctionPool,), {"inputs": {"test.t": test}})

    study = search(config_of(**SEALED), tmp_path / "s", runner=InProcess(pool_of("draft")))
    compare(study, pool=pool_of("final"))  # nothing was sealed with the draft
    joined = study.config.model_copy(update={"baselines": Baselines(models={"later": "you/model"})})
    later = replace(study, config=joined)
    with pytest.raises(StudyError, match=r"test\.t: not the items that its sealed rows scored"):
        compare(later, pool=pool_of("another"))
    assert "later" in [row.title for row in compare(later, pool=pool_of("final")).rows]


def test_a_later_model_is_scored_with_the_tokenizer_of_the_rows_beside_it(tmp_path):
    pools = [
        type(name, (FunctionPool,), {"inputs": {"tokenizer_source": name}}) for name in ("A", "B")
    ]
    study = search(config_of(**SEALED), tmp_path / "s", runner=InProcess(pools[0]))
    compare(study, pool=pools[0])
    joined = study.config.model_copy(update={"baselines": Baselines(models={"later": "you/model"})})
    later = replace(study, config=joined)
    with pytest.raises(StudyError, match=r"tokenizer_source: not the weights or items"):
        compare(later, pool=pools[1])
    assert "later" in [row.title for row in compare(later, pool=pools[0]).rows]


def test_a_row_that_was_left_out_is_not_marked_when_it_is_scored_later(tmp_path):
    config = config_of(**SEALED, baselines={"models": {"m": "you/model"}})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    first = compare(study, pool=failing_at({3: RuntimeError("no")}))
    second = compare(study, pool=FunctionPool)
    assert len(first.left_out) == 1 and not second.left_out
    assert len(second.rows) == len(first.rows) + 1
    assert not any(row.chosen_after_seal for row in second.rows)


def test_a_missing_model_is_found_before_anything_is_scored(tmp_path):
    config = config_of(**SEALED, baselines={"models": {"m": str(tmp_path / "none")}})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    with pytest.raises(ConfigError, match=r"'m': .*none: no such directory"):
        compare(study, pool=no_pool_for("nothing"))


def test_fixed_vectors_are_in_every_row(make_base, make_adapter, tmp_path):
    base = make_base("gemma")
    vectors = {name: {"source": str(make_adapter(base, n))} for n, name in enumerate("wxyz")}
    vectors["z"] |= {"fixed": 0.5}
    changes = {"base_model": str(base.path), "vectors": vectors, "baselines": ALL}
    study = search(config_of(**SEALED, **changes), tmp_path / "s", runner=InProcess(FunctionPool))
    for model in list_models(study):
        assert model.weights["z"] == 0.5
        sources = model.make(tmp_path / "scratch")
        assert sources["z"] == vectors["z"]["source"] and sources.keys() == model.weights.keys()


def test_a_search_baseline_that_could_not_run_is_refused_with_the_study():
    constraint = {"task": "c", "metric": "loss", "max_relative_to_base": 0.1}
    objective = {"terms": [{"task": "t", "metric": "loss"}], "constraints": [constraint]}
    with pytest.raises(ValueError, match="'black_box' supports no total, constraints or pareto"):
        config_of(objective=objective, baselines={"searches": {"x": {"surrogate": "black_box"}}})
