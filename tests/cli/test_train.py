"""extract and vectors on tiny models."""

import json

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.cli import optimer


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
    assert "is not an adapter" in refused.stderr and "Traceback" not in refused.stderr
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


def test_vectors_takes_base_and_pool_from_a_study_or_a_mergekit_yaml(folder, pool, tmp_path):
    base, tuned = pool
    fields = {
        "base_model": str(base),
        "dtype": "float16",
        "vectors": {"first": str(tuned[0]), "second": str(tuned[1])},
        "objective": {"terms": [{"text": "nowhere.jsonl"}]},
    }
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(fields), encoding="utf-8")
    as_json = ("--dtype", "float32", "--format", "json")
    by_hand = json.loads(optimer("vectors", *tuned, "--base", base, *as_json).stdout)
    for file in (study, folder / "my-merge.yml"):
        found = json.loads(optimer("vectors", file, *as_json).stdout)
        for key in ("norms", "surviving", "cosines"):
            assert list(found[key].values()) == list(by_hand[key].values())
    table = optimer("vectors", study).stdout
    assert "survives float16" in table and "* second: can be merged into this base" in table
    both = optimer("vectors", study, tuned[0], ok=False)
    assert "Missing option '--base'" in both.stderr


def test_sensitivity_takes_one_file_that_names_its_base(folder, pool):
    base, tuned = pool
    for arguments, why in (
        ((*tuned, "--sensitivity"), "found 2 argument"),
        ((folder / "my-merge.yml", "--sensitivity", "--base", base), "and --base"),
        ((folder / "my-merge.yml", "--sensitivity"), "Add --objective OBJECTIVE.yaml"),
        ((folder / "none.yaml", "--sensitivity"), "no such file"),
        ((tuned[0], "--base", base, "--objective", folder / "obj.yaml"), "is for --sensitivity"),
        (tuned, "Missing option '--base'"),
    ):
        refused = optimer("vectors", *arguments, ok=False)
        assert why.lower() in refused.stderr.lower() and "Traceback" not in refused.stderr


def test_sensitivity_shows_what_more_of_each_vector_does_on_a_real_model(folder):
    arguments = (
        *("vectors", folder / "my-merge.yml", "--sensitivity"),
        *("--objective", folder / "obj.yaml"),
    )
    text = optimer(*arguments).stdout
    assert text.startswith("| vector | objective: base / average | aaa | xyz | advice |")
    assert text.count("\n| ") == 3 and "orth searching" in text
    data = json.loads(optimer(*arguments, "--format", "json").stdout)
    for place in ("base", "average"):
        assert set(data["places"][place]["gradients"]) == {"aaa", "xyz"}
