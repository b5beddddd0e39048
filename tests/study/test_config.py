"""The fields of a study file, in YAML and in Python."""

import os
import re
from pathlib import Path

import pytest
import yaml

from optimer_hf.errors import ConfigError
from optimer_hf.files.digest import digest
from optimer_hf.study.config import TRACKERS, SearchBaseline, StudyConfig
from optimer_hf.study.directory import open_study
from tests.support.landscapes import config_of

FIELDS = {"base_model": "a/base", "objective": {"terms": [{"task": "t"}]}}


def test_a_text_is_the_source_of_a_vector_in_yaml_and_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vectors = {"math": "you/math", "code": "./code", "ja": {"source": "you/ja", "fixed": 1.0}}
    file = tmp_path / "study.yaml"
    file.write_text(
        "base_model: a/base\nobjective: {terms: [{task: t}]}\n"
        "vectors: {math: you/math, code: ./code, ja: {source: you/ja, fixed: 1.0}}"
    )
    config = StudyConfig.read(file)
    assert config == StudyConfig(**FIELDS, vectors=vectors)
    assert config.vectors["math"].source == "you/math"
    assert config.vectors["code"].source == str(tmp_path / "code")
    assert config.free == {"math": (0.0, 1.5), "code": (0.0, 1.5)}
    in_full = {n: {"source": v} if isinstance(v, str) else v for n, v in vectors.items()}
    assert config.digest() == StudyConfig(**FIELDS, vectors=in_full).digest()


def test_a_path_object_is_local_even_if_it_looks_like_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = StudyConfig(
        base_model=Path("a/base"), objective=FIELDS["objective"], vectors={"w": Path("a/w")}
    )
    assert config.base_model == os.fspath(tmp_path / "a" / "base")
    assert config.vectors["w"].source == os.fspath(tmp_path / "a" / "w")


def test_a_link_to_a_text_stands_for_the_text_in_what_a_study_is_known_by(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "search-v3.jsonl").touch()
    (tmp_path / "search.jsonl").symlink_to("store/search-v3.jsonl")

    def study(text):
        fields = {"base_model": "a/base", "vectors": {"w": "a/w"}}
        return StudyConfig(**fields, objective={"terms": [{"text": tmp_path / text}]})

    linked, real = study("search.jsonl"), study("store/search-v3.jsonl")
    assert linked.identity == real.identity
    assert [each.objective.terms[0].label for each in (linked, real)] == ["search-v3"] * 2


def test_a_tool_that_the_trainer_does_not_report_to_is_refused_when_the_file_is_read(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "base_model: a/base\nvectors: {w: a/w}\nobjective: {terms: [{task: t}]}\n"
        "search:\n  report_to: [tensorboard, wanbd]\n"
        "baselines: {searches: {other: {report_to: [paper]}}}\n"
    )
    expected = r"Expected one of azure_ml, .*tensorboard, trackio, wandb\."
    with pytest.raises(ConfigError) as caught:
        StudyConfig.read(file)
    first, second = str(caught.value).splitlines()
    said = r"study\.yaml:5: search\.report_to\.1: found 'wanbd'\. Did you mean 'wandb'\? "
    assert re.search(said + expected, first)
    place = r"study\.yaml:6: baselines\.searches\.other\.report_to\.0: "
    assert re.search(place + "found 'paper'. " + expected, second)


def test_every_tool_of_the_trainer_is_known():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) >= INTEGRATION_TO_CALLBACK.keys()


def test_what_is_neither_a_source_nor_fields_is_refused_by_name(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("base_model: a/b\nobjective: {terms: [{task: t}]}\nvectors: {math: 3}")
    with pytest.raises(ConfigError, match=r"study.yaml:3: vectors\.math: found 3"):
        StudyConfig.read(file)


VECTORS_OF_GUESSES = (
    "{math: {source: a/w, by: {mlp: {}, else: {fixed: 0}}}, it: {source: a/i, fixed: 1}}"
)


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_a_vector_whose_name_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="Expected one without '/'"):
        config_of(vectors={name: {"source": "a/b"}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vectors: {w: {}}", r"vectors\.w: .*exactly one of 'source'"),
        ("vectors: {w: {source: a/w, train: t}}", r"exactly one of 'source'"),
        ("vectors: {w: {source: a/w, bounds: [1, 1]}}", r"bounds \[1\.0, 1\.0\] are empty"),
        ("vectors: {w: {source: a/w, fixed: 1}}", "every vector is fixed"),
        ("vectors: {}", "at least 1 item"),
        (
            "vectors: {w: {source: a/w}}\nretarget: {r: {nope: 1}}",
            r"retarget\.r\.nope: no term 'nope' is recorded",
        ),
        (
            "vectors: {w: {source: a/w}}\nsearch: {n_trails: 3}",
            r"'search\.n_trails'.*Did you mean 'n_trials'",
        ),
        ("vectors: {w: {source: a/w}}\ndtype: int8", "dtype: found 'int8'"),
        *(
            (
                f"vectors: {{w: {{source: a/w}}}}\nsearch: {{{field}: {value}}}",
                rf"{field}: found .*less",
            )
            for field, value in [
                ("n_trials", 10_001),
                ("rescore_top", 10**9),
                ("rescore_limit", 10**18),
                ("seed", 2**40),
            ]
        ),
        (f"vectors: {{w: {{source: a/w}}}}\nsearch: {{n_trials: {'9' * 4000}}}", "4000 digits"),
        ("vectors: {w: {source: a/w, bounds: [-1e308, 1e308]}}", r"bounds\.0: found -1e\+308"),
        ("vectors: {w: {source: a/w, bounds: [0, 1e9]}}", r"bounds\.1: found 1000000000"),
        ("vectors: {w: {source: a/w, bounds: [0, 1e-300]}}", r"are closer than 0\.001"),
        ("vectors: {w: {source: a/w}, f: {source: a/f, fixed: 1e308}}", r"fixed: found 1e\+308"),
        ("vectors: {w: {source: a/w}}\nsearch: {total: [0, 1e308]}", r"total\.1: found 1e\+308"),
        (
            "vectors: {w: {source: a/w}}\nretarget: {r: {t: 1e308}}",
            r"retarget\.r\.t: found 1e\+308",
        ),
        (
            "vectors: {w: {source: a/w}}\nbaselines: {searches: {s: {limit: 1000000000}}}",
            r"limit: found 1000000000",
        ),
        *(
            (
                f"vectors: {VECTORS_OF_GUESSES}\nbaselines: {{weights: {{g: {given}}}}}",
                rf"study\.yaml:4: baselines\.weights\.g{message}",
            )
            for given, message in [
                ("{mat: 1}", r"\.mat: no vector is called 'mat'\. Did you mean 'math'\?"),
                ("{math.mpl: 1}", r"\.math\.mpl: no vector .*\. Did you mean 'math\.mlp'\?"),
                ("{it: 0.5}", r"\.it: 'it' is fixed, so every row has it as it is"),
                ("{math.else: 0.5}", r"\.math\.else: 'math\.else' is fixed"),
                ("{math: 1e9}", r"\.math: found 1000000000"),
                ("{}", ": .*at least 1 item"),
            ]
        ),
    ],
)
def test_an_impossible_study_is_refused_with_field_and_reason(tmp_path, text, message):
    path = tmp_path / "study.yaml"
    path.write_text(
        f"base_model: a/b\nobjective: {{terms: [{{task: t, metric: loss}}]}}\n{text}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match=message) as caught:
        StudyConfig.read(path)
    assert "study.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": {"": "gpu"}}, r"device_map\.: found 'gpu'; expected the number of a GPU"),
        ({"device_map": "two"}, r"device_map"),
        ({"device_map": {"model": -1}}, r"device_map\.model: found '?-1'?; expected the number"),
        ({"max_memory": {0: "60GiB"}}, r"max_memory: it needs a device_map"),
        (
            {"device_map": "auto", "max_memory": {"disk": "60GiB"}},
            r"max_memory\.disk: found device 'disk'; expected the number of a GPU, or 'cpu'",
        ),
        (
            {"device_map": "auto", "max_memory": {0: "much"}},
            r"max_memory\.0: found 'much'; expected an amount like 60GiB",
        ),
    ],
)
def test_a_device_map_that_cannot_be_followed_is_refused(tmp_path, settings, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"vectors": {"w": "./w"}} | settings))
    with pytest.raises(ConfigError, match=message):
        StudyConfig.read(path)


def test_where_a_model_lies_is_no_part_of_a_study():
    plain = StudyConfig(**FIELDS, vectors={"w": "./w"})
    for device_map in ("auto", {"": 0, "lm_head": "cpu"}):
        spread = StudyConfig(
            **FIELDS,
            vectors={"w": "./w"},
            device_map=device_map,
            max_memory={0: "60GiB", "cpu": "1.5TB"},
        )
        assert spread.digest() == plain.digest()
        again = StudyConfig.model_validate_json(spread.model_dump_json())
        assert again.device_map == device_map


def test_settings_of_another_search_are_named_as_before():
    """Their digest names the directory of a baseline, which a later version has to find again."""
    settings = SearchBaseline(surrogate="random")
    assert digest(settings.model_dump(mode="json"))[:6] == "593879"


@pytest.mark.parametrize(
    ("by", "weights"),
    [
        ({"layers": 2}, ["w.layers.1", "w.layers.2"]),
        ({"gradient": 2}, ["w.gradient.1", "w.gradient.2"]),
        (["layers.0:8", "layers.8:24"], ["w.layers.0:8", "w.layers.8:24"]),
        ({"gradient.1": {"fixed": 0.5}, "gradient.2": None}, ["w.gradient.1", "w.gradient.2"]),
        (
            {"mlp/gradient": 2, "else": {"fixed": 0.5}},
            ["w.mlp/gradient.1", "w.mlp/gradient.2", "w.else"],
        ),
        (
            {"layers.0:8/mlp": None, "layers.0:8/else": None, "layers.8:24/gradient": 2},
            [
                *("w.layers.0:8/mlp", "w.layers.0:8/else"),
                *("w.layers.8:24/gradient.1", "w.layers.8:24/gradient.2"),
            ],
        ),
        (
            ["layers.1/mlp", "layers.1/else", "layers.2"],
            ["w.layers.1/mlp", "w.layers.1/else", "w.layers.2"],
        ),
    ],
)
def test_a_vector_is_split_along_its_layers_in_several_ways(by, weights):
    config = StudyConfig(**FIELDS, vectors={"w": {"source": "a/w", "by": by}})
    assert config.weight_names == weights
    fixed = config.vectors["w"].with_fixed("w", {weights[0]: 0.25})
    again = StudyConfig(**FIELDS, vectors={"w": fixed.model_dump()})
    assert again.fixed == config.fixed | {weights[0]: 0.25} and again.weight_names == weights


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ({"layers": 2, "else": {}}, "'layers' splits the whole vector"),
        ({"gradient": 2, "layers": 3}, "splits the whole vector"),
        ({"mlp": {"groups": 2}, "else": {}}, "only 'layers' and 'gradient' have groups"),
        (["layers.0:8", "layers.9:24"], "expected each layer in one group, in order"),
        (["layers.0:8", "layers.8:4"], "expected each layer in one group, in order"),
        (["layers.0:0", "layers.0:8"], "expected each layer in one group, in order"),
        (["gradient.2", "gradient.1"], "expected each layer in one group, in order"),
        (["mlp", "layers.0:8"], "expected each layer in one group, in order"),
        (["layers.0:8/mlp", "layers.8:9", "layers.0:8/else"], "each layer in one group, in order"),
        (["layers.0:8/mlp", "layers.0:8", "layers.8:9"], "found the group 'layers.0:8'; expected"),
        (["layers.1/else", "layers.1/mlp", "layers.2"], "it takes every tensor"),
        (["mlp/gradient.2", "mlp/gradient.1", "else"], "expected each layer in one group"),
        (["mlp/gradient.1", "else"], "expected each layer in one group"),
        (["mlp/up", "else"], "found the group 'mlp/up'"),
        (["mlp", "gradient.1"], "found the group 'gradient.1'"),
        (["else", "mlp"], "it takes every tensor"),
        (["mlp"], "one group is the whole vector"),
    ],
)
def test_groups_that_do_not_go_together_are_refused(by, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig(**FIELDS, vectors={"w": {"source": "a/w", "by": by}})


# -- fields that others make meaningless -----------------------------------------------------------


TASK, TEXT = {"task": "arc_easy"}, {"text": "a.jsonl"}
IDLE = [  # what is added to a sound study, the field that does nothing, and beside what
    ({"vectors.w": {"fixed": 1.0, "bounds": [0, 2]}}, "vectors.w.bounds", "'fixed'"),
    (
        {"vectors.w": {"by": {"mlp": {"fixed": 1.0, "bounds": [0, 2]}, "else": {}}}},
        "vectors.w.by.mlp.bounds",
        "'fixed'",
    ),
    (
        {
            "vectors.w": {
                "bounds": [0, 2],
                "by": {"mlp": {"fixed": 1.0}, "else": {"bounds": [0, 1]}},
            }
        },
        "vectors.w.bounds",
        "every group",
    ),
    ({"vectors.w": {"mixture": {"v": 1}, "budget": "one"}}, "vectors.w.budget", "'source'"),
    ({"search": {"sampler": "s", "surrogate": "random"}}, "search.surrogate", "'sampler'"),
    ({"search": {"sampler": "s", "pareto": True}}, "search.pareto", "'sampler'"),
    (
        {"baselines": {"searches": {"b": {"sampler": "s", "surrogate": "random"}}}},
        "baselines.searches.b.surrogate",
        "'sampler'",
    ),
    ({"search": {"rescore_top": 0, "rescore_limit": 9}}, "search.rescore_limit", "rescore_top"),
    (
        {
            "search": {"rescore_top": 0},
            "objective.terms": [TASK, {"task": "t", "rescore_only": True}],
        },
        "objective.terms.1.rescore_only",
        "search.rescore_top is 0",
    ),
    (
        {"test": {"terms": [{"task": "t"}, {"text": "b.jsonl", "rescore_only": True}]}},
        "test.terms.1.rescore_only",
        "scores every term",
    ),
    ({"objective.terms": [{**TASK, "text_field": "t"}]}, "objective.terms.0.text_field", "'task'"),
    ({"objective.split_by": "prompt"}, "objective.split_by", "'hash_range'"),
    (
        {"objective.fewshot_as_multiturn": True},
        "objective.fewshot_as_multiturn",
        "apply_chat_template",
    ),
    (
        {"objective.terms": [TEXT], "objective.system_instruction": "Be brief."},
        "objective.system_instruction",
        "'task'",
    ),
]


def study_with(changes: dict) -> dict:
    """Return the fields of a study with changes, each under its place; those of a mapping are laid
    over it.
    """
    study = {
        "base_model": "a/base",
        "vectors": {"v": {"source": "a/v"}, "w": {"source": "a/w"}},
        "objective": {"terms": [TASK, TEXT]},
    }
    for place, value in changes.items():
        *parents, name = place.split(".")
        part = study
        for parent in parents:
            part = part[parent]
        part[name] = part.get(name, {}) | value if isinstance(value, dict) else value
    return study


@pytest.mark.parametrize(("changes", "field", "reason"), IDLE, ids=[each[1] for each in IDLE])
def test_a_field_that_does_nothing_is_named_once_and_stops_nothing(
    tmp_path, caplog, changes, field, reason
):
    file, study_dir = tmp_path / "study.yaml", tmp_path / "study"
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}')
    file.write_text(yaml.safe_dump(study_with(changes), sort_keys=False))
    StudyConfig.read(file)
    (line,) = caplog.messages
    named = re.match(rf"{re.escape(str(file))}:(\d+): {field}: ", line)
    assert field.split(".")[-1] in file.read_text().splitlines()[int(named[1]) - 1]
    assert reason in line and "; leave it out" in line
    open_study(StudyConfig.read(file), study_dir)
    open_study(StudyConfig.read(file), study_dir)  # goes on
    caplog.clear()
    open_study(StudyConfig.read_record(study_dir / "study.json"), study_dir)
    everything = yaml.safe_load(StudyConfig(**study_with({})).model_dump_json())
    file.write_text(yaml.safe_dump(everything))
    StudyConfig.read(file)  # each field at its default
    assert not caplog.messages


def test_a_study_on_record_can_be_given_as_a_study(tmp_path):
    changes = {"vectors.w": {"fixed": 1.0, "bounds": [0, 2]}}
    open_study(StudyConfig(**study_with(changes)), tmp_path / "study")
    given = StudyConfig.read(tmp_path / "study" / "study.json")
    open_study(given, tmp_path / "study")
