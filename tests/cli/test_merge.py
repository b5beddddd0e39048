"""merge, with both engines, and the flags of mergekit."""

import click
import pytest
import yaml
from click.testing import CliRunner
from mergekit.common import parse_kmb
from mergekit.options import MergeOptions, add_merge_options

from optimer_hf.cli import main
from optimer_hf.cli.merge import merge, parse_size
from tests.support.cli import assert_is_merge, optimer, process


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


def test_the_card_of_a_native_merge_links_the_paper(pool, tmp_path):
    config = yaml.safe_dump(linear_config(pool, [0.3, 0.6]))
    (tmp_path / "m.yml").write_text(config, encoding="utf-8")
    # in another process, since this one may have registered the method
    result = process("-m", "optimer_hf", "merge", tmp_path / "m.yml", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "[OptiMer](https://arxiv.org/abs/" in (tmp_path / "out" / "README.md").read_text()


def test_a_size_that_mergekit_cannot_read_is_a_usage_error(folder, tmp_path):
    flags = ["--out-shard-size", "much"]
    result = CliRunner().invoke(main, ["merge", str(folder / "my-merge.yml"), "out", *flags])
    assert result.exit_code == 2 and "found 'much', expected a number such as" in result.stderr


def test_merge_does_not_write_over_files(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in optimer("merge", folder / "my-merge.yml", tmp_path, ok=False).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merge_says_how_much_of_its_delta_survives_in_16_bits(
    folder, pool, tmp_path, caplog, dtype
):
    config = yaml.safe_load((folder / "my-merge.yml").read_text(encoding="utf-8"))
    config |= {"merge_method": "optimer", "out_dtype": dtype}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with caplog.at_level("INFO", logger="optimer_hf"):
        optimer("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert ("rounding to bfloat16 keeps" in caplog.text) == (dtype == "bfloat16")
    assert "rounding to float32" not in caplog.text


def test_the_flags_are_those_of_mergekit():
    @add_merge_options
    def theirs(**options) -> None: ...

    ours = {option.name: option for option in merge.params if isinstance(option, click.Option)}
    for option in theirs.__click_params__:
        mine = ours.pop(option.name)
        assert {*mine.opts} == {*option.opts} and {*mine.secondary_opts} == {*option.secondary_opts}
        assert mine.count == option.count and mine.is_flag == option.is_flag
        if option.name != "out_shard_size":
            assert mine.type.name.removesuffix(" range") == option.type.name
    assert set(ours) == {"engine"}


@pytest.mark.parametrize("text", ["500000", "500k", "200M", "5b"])
def test_a_size_is_what_mergekit_reads(text):
    assert parse_size(text) == parse_kmb(text)


@pytest.mark.parametrize("text", ["", "M", "0", "-5", "\N{SUPERSCRIPT TWO}M", "1" * 20])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter, match=r"expected a number such as 200M or 5B"):
        parse_size(text)


def test_only_the_flags_that_are_given_are_handed_on(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        "optimer_hf.merging.engines.merge",
        lambda path, out, *, options, engine: seen.update(options.model_dump()) or "native",
    )
    (tmp_path / "m.yml").write_text("merge_method: optimer\n")
    flags = ["--no-copy-tokenizer", "--out-shard-size", "2k", "--gpu-rich", "--random-seed", "3"]
    optimer("merge", tmp_path / "m.yml", tmp_path / "out", *flags)
    given = {"copy_tokenizer": False, "out_shard_size": 2000, "gpu_rich": True, "random_seed": 3}
    assert seen == MergeOptions(**given).model_dump()
