"""Which files of a directory are published."""

import json

import pytest
import yaml
from huggingface_hub import HfApi

from optimer_hf import hub as hubs
from optimer_hf.errors import HubError
from optimer_hf.hub.local_inputs import Placed
from optimer_hf.hub.publication import _read_results, choose_files, vanilla_config_of
from optimer_hf.models.layout import copy_beside_weights
from optimer_hf.recipes.build import build
from optimer_hf.recipes.record import Ingredient, Lock, Recipe
from tests.support.hub import ALICE
from tests.support.tiny import tiny_model


def test_only_files_on_the_allow_list_are_pushed(hub, make_vector, name):
    vector = make_vector("adapter")
    for file in (".env", "optimizer.pt", "training_args.bin", "notes.txt", "trainer_state.json"):
        (vector / file).write_text("secret")
    done = hubs.push(vector, f"alice/{name}", token=ALICE)
    there = set(HfApi(token=ALICE).list_repo_files(f"alice/{name}")) - {".gitattributes"}
    assert there == set(done.sent)
    assert there == {"README.md", "vector.json", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    "file",
    [
        *("LICENSE-MODEL", "LICENCE", "COPYING", "LICENSE.rst", "USE_POLICY.txt", "NOTICE.md"),
        *("spiece.model", "vocab.bpe", "chat_template.json", "qwen.tiktoken", "tekken.json"),
        "additional_chat_templates/tool_use.jinja",
    ],
)
def test_what_a_build_copies_beside_weights_is_published(make_vector, tmp_path, file):
    vector = make_vector("adapter")
    (vector / file).parent.mkdir(exist_ok=True)
    (vector / file).write_text("{}")
    copy_beside_weights(vector, tmp_path)
    assert (tmp_path / file).is_file()
    assert file in choose_files(vector).files


@pytest.mark.parametrize(
    "file",
    [
        *("vocab.pkl", "LICENSE.env", "tokenizer_secrets.json", ".partial-model.safetensors"),
        *("LICENSE-tool.py", "tokenizer.py", "NOTICE.sh", "LICENSE_x.pkl"),
    ],
)
def test_only_exact_names_are_published(make_vector, file):
    vector = make_vector("adapter")
    (vector / file).write_bytes(b"x")
    if file.endswith("safetensors"):
        with pytest.raises(HubError, match="weights of unknown use"):
            choose_files(vector)
    else:
        assert file not in choose_files(vector).files


def test_weights_that_are_not_read_are_not_published(make_recipe, tmp_path):
    build(make_recipe("delta") / "recipe.yaml", tmp_path / "model")
    stale = ("model-00001-of-00002.safetensors", "consolidated.safetensors")
    for each in stale:
        (tmp_path / "model" / each).write_bytes(b"x")
    recipe = yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text())
    pins = {key: Placed(f"alice/{key}@{'0' * 40}") for key in recipe["vectors"]}
    publication = choose_files(tmp_path / "model", pins)
    assert "model.safetensors" in publication.files and not publication.files.keys() & set(stale)


def test_a_directory_without_our_metadata_is_refused(tmp_path, save_model):
    with pytest.raises(HubError, match=r"neither vector\.json nor recipe\.yaml"):
        choose_files(save_model(tiny_model()))


def test_a_torn_record_is_pushed_without_its_torn_line(make_recipe, make_vector):
    folder = make_recipe()
    (folder / "study").mkdir()
    crash = {"number": 1, "worker": "tcp://node7:1", "error": "RuntimeError: on node7\nTraceback"}
    first = {"number": 0, "error": "  ", "note": "one\u2028line\x85"}
    lines = [json.dumps(first, ensure_ascii=False), json.dumps(crash), '{"number": 2, "wei']
    (folder / "study" / "trials.jsonl").write_text("\n".join(lines))
    pushed = {f"v{n}": Placed(f"alice/v{n}@{'0' * 40}") for n in range(2)}
    written = choose_files(folder, pushed).text("study/trials.jsonl").rstrip("\n").split("\n")
    assert json.loads(written[0])["note"] == first["note"]
    assert [json.loads(line)["error"] for line in written] == [None, "RuntimeError"]
    (folder / "study" / "trials.jsonl").write_text("\n".join([lines[2], lines[0]]))
    with pytest.raises(HubError, match="line 1 is not a trial"):
        choose_files(folder, pushed)


@pytest.mark.parametrize(
    ("dtypes", "file", "is_vanilla"),
    [
        ({"x": "bfloat16", "y": "float32"}, "model.safetensors", True),
        ({"x": "bfloat16", "y": "float32"}, "vectors.safetensors", True),
        ({"x": "bfloat16", "y": "int8"}, "model.safetensors", False),
        (None, "model.safetensors", True),  # version 0.1.0 recorded no dtypes
        (None, "vector.safetensors", False),
    ],
)
def test_mergekit_alone_is_offered_only_deltas_that_it_can_read(dtypes, file, is_vanilla):
    commit = "0" * 40
    recipe = Recipe(
        name="r",
        base_model=f"o/base@{commit}",
        dtype="bfloat16",
        vectors={name: Ingredient(source=f"o/{name}@{commit}", weight=0.5) for name in "xy"},
    )
    lock = {
        **{"base": {}, "vectors": {"x": {file: "0"}, "y": {file: "0"}}, "dtype": "bfloat16"},
        **{"kinds": {"x": "delta", "y": "delta"}, "weights": recipe.weights},
    }
    lock |= {} if dtypes is None else {"dtypes": dtypes}
    config = vanilla_config_of(recipe, Lock.model_validate(lock))
    assert (config is not None) == is_vanilla


def test_results_of_0_1_0_are_read_with_the_study_beside_them(golden):
    run = golden / "runs" / "tiny"
    results = _read_results(run, {"results.json", "study/study.json"})
    assert results is not None
    assert results.merge.weights == Recipe.read(run / "recipe.yaml").weights
    assert _read_results(run, {"study/study.json"}) is None
