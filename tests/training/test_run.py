"""Continual pre-training with the real Trainer: what a run leaves behind, refuses, and how it
survives a kill.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError, CorpusError, ModelError, OutputError
from optimer_hf.experiment.status import status_of
from optimer_hf.training import run as run_module
from optimer_hf.training.arguments import TRAINER_DEFAULTS
from optimer_hf.training.callback import count_blocks
from optimer_hf.training.captured import CapturedTrainer
from optimer_hf.training.checkpoints import SpentRecord, StartedRecord
from optimer_hf.training.checks import check_config
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.packing import pack
from optimer_hf.training.run import is_trained, prepare, train
from optimer_hf.training.trainer import build_trainer
from optimer_hf.vectors.training_record import Speed
from tests.support.tiny import SIZES
from tests.support.training import FAST, LORA, losses_of, record_of
from tests.support.warm import start_optimer

ROOT = Path(__file__).parents[2]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- what a run leaves behind ----------------------------------------------------------------------


def test_a_lora_run_lowers_the_loss_and_leaves_an_adapter_and_its_record(
    make_config, kind, tmp_path
):
    config = make_config(kind, max_tokens=32 * 30)
    assert train(config, tmp_path / "out") == tmp_path / "out"
    assert names_in(tmp_path / "out") == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    losses = losses_of(tmp_path / "out")
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])  # its head is frozen
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_what_a_run_writes_names_no_path_of_this_machine(make_config, make_base, tmp_path):
    train(make_config(), tmp_path / "out")
    adapter_config = json.loads(
        (tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8")
    )
    assert adapter_config["base_model_name_or_path"] == make_base("gemma", torch.float32).reference
    for name in ("adapter_config.json", "training.json"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert str(make_base("gemma", torch.float32).path.parent) not in text
        assert str(tmp_path) not in text


def test_the_record_names_the_base_the_corpus_and_the_settings(make_config, tmp_path):
    config = make_config(seed=5)
    train(config, tmp_path / "out")
    record = record_of(tmp_path / "out")
    assert record["config_sha256"] == config.digest()
    assert record["corpus"]["name"] == "aaa.train.jsonl"
    assert record["corpus"]["n_tokens"] == 192
    assert 0 < record["corpus"]["n_documents"] < 120
    assert record["training"]["n_steps"] == 6
    assert record["training"]["seed"] == 5
    trained_with = {"torch", "transformers", "peft", "accelerate", "safetensors"}
    assert trained_with <= set(record["versions"])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_full_parameter_run_leaves_a_float32_model(make_base, corpus_dir, tmp_path, stored):
    base = make_base("llama", stored)
    config = TrainConfig(
        name="aaa",
        base_model=str(base.path),
        corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
        block_size=32,
        max_tokens=960,
        trainer={"learning_rate": 3e-3, "save_strategy": "no"},
    )
    train(config, tmp_path / "out")
    tensors, before = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(base.path / "model.safetensors"),
    )
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors.keys() == before.keys()
    assert not torch.equal(tensors["lm_head.weight"], before["lm_head.weight"].float())
    losses = losses_of(tmp_path / "out")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_the_same_config_gives_the_same_losses_and_another_seed_others(make_config, tmp_path):
    for out, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(make_config(seed=seed), tmp_path / out)
    assert (
        losses_of(tmp_path / "one") == losses_of(tmp_path / "two") != losses_of(tmp_path / "other")
    )


def test_a_run_gives_its_memory_back_once_nothing_holds_the_model(
    make_config, tmp_path, monkeypatch
):
    """On a GPU a captured step has memory of its own, which is of no use to the next run."""
    started: list[weakref.ref[object]] = []
    stock, seen = CapturedTrainer.train, []

    def note(self, *args, **options):
        started.extend((weakref.ref(self), weakref.ref(self.model)))
        return stock(self, *args, **options)

    monkeypatch.setattr(CapturedTrainer, "train", note)
    monkeypatch.setattr(run_module, "collect_memory", lambda: seen.append([r() for r in started]))
    train(make_config(), tmp_path / "out")
    assert seen == [[None, None]]


def test_the_runs_of_a_recipe_load_their_tokenizer_once(make_config, tmp_path, monkeypatch):
    config, loaded, stock = make_config(), [], run_module.read_tokenizer
    run_module._tokenizer.cache_clear()

    def note(path):
        loaded.append(path)
        return stock(path)

    monkeypatch.setattr(run_module, "read_tokenizer", note)
    for number in range(2):
        prepare(config, tmp_path / f"run-{number}")
    assert len(loaded) == 1


def test_a_finished_run_is_not_touched_by_a_second_call(make_config, tmp_path):
    out = train(make_config(), tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert train(make_config(), out) == out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"lora": {"rr": 4}},
            r"train config 'aaa': lora\.rr: unknown field of LoraConfig\. Did you mean 'r'\?",
        ),
        (
            {"trainer": {"learning_ratee": 1e-4}},
            r"trainer\.learning_ratee: unknown field of TrainingArguments\. Did you mean "
            r"'learning_rate'\?",
        ),
        ({"trainer": {"seed": 1}}, r"trainer\.seed: set it through `seed`"),
        ({"trainer": {"output_dir": "x"}}, r"trainer\.output_dir: set it through the command line"),
        ({"trainer": {"learning_rate": "high"}}, r"trainer\.learning_rate: found 'high'\. Input"),
        (
            {"trainer": {"weight_decay": float("nan")}},
            r"trainer\.weight_decay: found nan\. .*finite",
        ),
        ({"lora": {"r": "4"}}, r"lora\.r: found '4'\. Input should be a valid integer"),
        (
            {"trainer": {"per_device_train_batch_size": 0}},
            r"trainer\.per_device_train_batch_size: found 0\. Expected a number above 0",
        ),
        ({"trainer": {"eval_strategy": "epoch"}}, r"eval_strategy: found 'epoch'.*leave it out"),
        ({"trainer": {"push_to_hub": True}}, r"push_to_hub: found True.*`optimer push`"),
        ({"trainer": {"learning_rate": -1.0}}, r"trainer\.learning_rate: found -1\.0\. Expected"),
        ({"trainer": {"report_to": "tensorbord"}}, r"'aaa': trainer\.report_to: tensorbord"),
        (
            {"trainer": {"lr_scheduler_kwargs": {"x": 1}}},
            r"trainer\.lr_scheduler_kwargs: .*'x'",
        ),
    ],
)
def test_an_unknown_field_is_refused_before_anything_is_written(
    make_config, tmp_path, fields, message
):
    config = make_config(**fields)
    with pytest.raises(ConfigError, match=message):
        check_config(config)
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"trainer": {"lr_scheduler_type": "cosinus"}},
            r"trainer\.lr_scheduler_type: .*cosinus",
        ),
        (
            {"lora": {**LORA, "target_modules": ["no_such_layer"]}},
            r"train config 'aaa': lora: .*no_such_layer",
        ),
    ],
)
def test_a_value_that_a_library_refuses_is_a_config_error(make_config, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        train(make_config(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{"r": -1}, {"lora_dropout": 2.0}, {"target_modules": 5}])
def test_layers_that_cannot_be_made_are_refused_before_the_corpus_is_packed(
    make_config, tmp_path, fields
):
    with pytest.raises(ConfigError, match=r"train config 'aaa': lora[.:]"):
        train(make_config(lora={**LORA, **fields}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_of_a_run_that_is_damaged_is_named(make_config, tmp_path):
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ConfigError, match=r"training\.json:1: not valid JSON"):
        train(make_config(), tmp_path)
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"training\.json: field 'config_sha256' is missing"):
        train(make_config(), tmp_path)


def test_a_file_in_place_of_the_output_directory_is_refused(make_config, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="already exists and is not a training directory"):
        train(make_config(), tmp_path / "out")
    with pytest.raises(OutputError, match="cannot create this directory"):
        train(make_config(), tmp_path / "out" / "deeper")


@pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("field", ["modules_to_save", "target_modules"])
def test_half_of_a_tied_pair_is_refused_before_the_corpus_is_packed(
    make_config, tmp_path, name, field
):
    config = make_config(lora={**LORA, field: [name]})
    with pytest.raises((ConfigError, ModelError), match=rf"lora: .*{name}.* but the base ties"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_untied_embeddings_may_be_saved_with_the_adapter(make_config, tmp_path):
    train(
        make_config("llama", lora={**LORA, "modules_to_save": ["lm_head"]}, max_tokens=64),
        tmp_path / "out",
    )
    assert any(
        "lm_head" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors")
    )


def test_a_run_is_known_again_though_peft_writes_into_its_options(make_config, tmp_path):
    lora = LORA | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    config = make_config("gemma", lora=lora)
    prepare(config, tmp_path / "out")
    assert lora["modules_to_save"] == ["embed_tokens"]
    assert not is_trained(make_config("gemma", lora=lora), tmp_path / "out")


def test_a_lora_on_an_untied_head_is_trained(make_config, tmp_path):
    lora = {**LORA, "target_modules": ["q_proj", "lm_head"]}
    train(make_config("llama", lora=lora, max_tokens=64), tmp_path / "out")
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moved = {name for name, tensor in adapter.items() if "lora_B" in name and tensor.any()}
    assert any("lm_head" in name for name in moved)
    assert any("q_proj" in name for name in moved)


def test_a_run_is_known_wherever_it_lies_and_by_its_text(make_config, corpus_dir, tmp_path):
    text = tmp_path / "one" / "aaa.jsonl"
    text.parent.mkdir()
    text.write_bytes((corpus_dir / "aaa.train.jsonl").read_bytes())
    train(make_config(corpus=CorpusConfig(path=text)), tmp_path / "one" / "out")
    (tmp_path / "one").rename(tmp_path / "two")
    out, text = tmp_path / "two" / "out", tmp_path / "two" / "aaa.jsonl"
    config = make_config(corpus=CorpusConfig(path=text))
    assert is_trained(config, out)
    text.write_bytes(text.read_bytes().replace(b"a", b"b", 1))
    told = "was trained with a different content of corpus under the same name. Give another"
    with pytest.raises(OutputError, match=told):
        train(config, out)
    text.unlink()  # a trained vector does not need it
    assert is_trained(config, out)


def test_a_run_on_another_base_of_the_same_name_is_refused(make_config, make_base, tmp_path):
    for place, kind in (("one", "gemma"), ("two", "llama")):
        shutil.copytree(make_base(kind, torch.float32).path, tmp_path / place / "base")
    config = make_config().model_copy(update={"base_model": str(tmp_path / "one" / "base")})
    out = train(config, tmp_path / "out")
    other = config.model_copy(update={"base_model": str(tmp_path / "two" / "base")})
    with pytest.raises(OutputError, match="a different content of base_model under the same name"):
        train(other, out)


def test_a_run_whose_text_was_corrected_since_is_refused_and_left_alone(
    make_config, corpus_dir, tmp_path
):
    text = tmp_path / "aaa.jsonl"
    text.write_bytes((corpus_dir / "aaa.train.jsonl").read_bytes())
    config, out = make_config(corpus=CorpusConfig(path=text)), tmp_path / "out"
    prepare(config, out)  # killed before its first checkpoint
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    text.write_bytes(text.read_bytes().replace(b"a", b"b"))
    with pytest.raises(OutputError, match="was started with a different content of corpus"):
        prepare(config, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_asking_whether_a_run_is_finished_changes_nothing(make_config, tmp_path):
    (tmp_path / "started.json").write_text('{"config_sha256": "of another config"}')
    (tmp_path / "my-notes.txt").write_text("years of work")
    broken = tmp_path / "checkpoints" / "checkpoint-3"
    broken.mkdir(parents=True)
    (broken / "trainer_state.json").write_text("{")
    for ask in (is_trained, prepare, train):
        with pytest.raises(OutputError, match="a run that was started with a different config"):
            ask(make_config(), tmp_path)
    assert names_in(tmp_path) == {"started.json", "my-notes.txt", "checkpoints"}
    assert names_in(broken) == {"trainer_state.json"}


def test_what_lies_beside_a_run_is_kept(make_config, tmp_path):
    config = make_config(trainer={**FAST, "save_strategy": "steps", "save_steps": 3})
    prepare(config, tmp_path)
    (tmp_path / "my-notes.txt").write_text("years of work")
    train(config, tmp_path)
    assert (tmp_path / "my-notes.txt").read_text() == "years of work"


def test_a_directory_that_another_run_writes_is_refused(make_config, tmp_path):
    out = tmp_path / "out"
    with run_module._lock(out):
        for begin in (train, prepare):
            with pytest.raises(OutputError, match=r"out: another process is writing to it"):
                begin(make_config(), out)
        assert not out.exists()
        with pytest.raises(OutputError, match="another process"):
            train(make_config(), tmp_path / "a" / ".." / "out")
    train(make_config(max_tokens=64), out)
    assert names_in(tmp_path) <= {"out", "a"}


def test_a_directory_with_foreign_files_is_refused_and_left_alone(make_config, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="already exists and is not a training directory"):
        train(make_config(), tmp_path)
    assert names_in(tmp_path) == {"thesis.tex"}


def test_another_config_in_the_same_directory_is_refused(make_config, tmp_path):
    out = train(make_config(), tmp_path / "out")
    differing = "seed: found 0, expected 1"
    with pytest.raises(OutputError, match=rf"a different config \({differing}\)\. Give another"):
        train(make_config(seed=1), out)
    lora = {**LORA, "r": LORA["r"] + 1}
    with pytest.raises(
        OutputError, match=r"config \(lora\.r: found \d+, expected \d+\)\. Give another"
    ):
        train(make_config(lora=lora), out)
    with pytest.raises(
        OutputError, match=r"different config \(max_tokens: found 192, expected 32\)\. Give another"
    ):
        train(make_config(max_tokens=32), out)
    assert record_of(out)["training"]["seed"] == 0


def test_a_corpus_that_is_too_small_leaves_no_directory(make_config, tmp_path):
    with pytest.raises(CorpusError, match="max_tokens asks for 1,000,000"):
        train(make_config(max_tokens=1_000_000), tmp_path / "out")
    assert not (tmp_path / "out").exists()


TABLES = {
    "gpt2": GPT2Config(**SIZES, n_positions=12),
    "opt": OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=12, dropout=0.0
    ),
    "gptj": GPTJConfig(**SIZES, n_positions=12, rotary_dim=4),
}
ROTARY = {
    "no scaling": {},
    "YaRN": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
}


@pytest.mark.parametrize("kind", [*TABLES, *ROTARY])
def test_documents_are_cut_only_where_the_base_can_read_no_more(
    kind, make_base, make_config, tmp_path, caplog
):
    made = make_base("llama", torch.float32).path
    base, out, is_cut = tmp_path / "base", tmp_path / "out", kind in TABLES
    shutil.copytree(made, base)
    config = TABLES.get(kind) or LlamaConfig.from_pretrained(
        made, max_position_embeddings=12, **ROTARY[kind]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    settings = {"base_model": str(base), "lora": None}
    run = make_config("llama").model_copy(update=settings)
    packed = prepare(run, out)
    assert packed is not None
    assert packed.blocks.shape == (6, 2, 32)
    assert (packed.blocks[:, 1].max() == 11) == is_cut
    assert "block_size is 32, the config of the base says max_position_embeddings 12: " in (
        caplog.text
    )
    assert ("documents are cut there" in caplog.text) == is_cut
    assert ("positions beyond have not been trained" in caplog.text) != is_cut
    if not is_cut:
        model = AutoModelForCausalLM.from_pretrained(base)
        model(input_ids=torch.zeros(1, 32, dtype=torch.long))

    (out / "blocks.npy").unlink()
    again = prepare(run, out)
    assert again is not None
    assert again.sha256 == packed.sha256


def test_lost_blocks_are_packed_again_with_the_context_that_they_had(make_config, tmp_path):
    config, out = make_config("llama"), tmp_path / "out"
    packed = prepare(config, out)
    assert packed is not None
    started = StartedRecord.read(out / "started.json")
    assert started.context is None
    corpus, settings = config.corpus, {"block_size": 32, "max_tokens": 192, "seed": config.seed}
    tokenizer = AutoTokenizer.from_pretrained(config.base_model)
    cut = pack(corpus, tokenizer, **settings, out=tmp_path / "cut.npy", context=12)
    (out / "blocks.npy").unlink()
    changed = {"context": 12, "blocks_sha256": cut.sha256}
    started.model_copy(update=changed).write(out / "started.json")
    again = prepare(config, out)
    assert again is not None
    assert again.sha256 == cut.sha256 != packed.sha256

    (out / "blocks.npy").unlink()
    started.model_copy(update=changed | {"context": None}).write(out / "started.json")
    with pytest.raises(OutputError, match="or another version of optimer-hf has packed it"):
        prepare(config, out)


def test_what_was_packed_for_another_corpus_does_not_stay(make_config, tmp_path):
    (tmp_path / "blocks.2.npy").write_bytes(b"of a mixture whose run was killed")
    train(make_config(max_tokens=32), tmp_path)
    assert "blocks.2.npy" not in names_in(tmp_path)


def test_the_tokens_of_a_last_smaller_batch_are_counted_as_they_are(make_config, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = {**FAST, "per_device_train_batch_size": 4, "max_steps": 3}
    train(make_config(trainer=trainer, max_tokens=6 * 32), tmp_path / "out")
    assert record_of(tmp_path / "out")["training"]["n_tokens"] == (4 + 2 + 4) * 32
    assert ": 320/320 tokens, " in caplog.text
    (part,) = status_of(tmp_path / "out").parts
    assert part.state == "trained on 320 tokens"


@given(
    st.builds(
        SimpleNamespace,
        train_batch_size=st.integers(1, 6),
        world_size=st.integers(1, 3),
        gradient_accumulation_steps=st.integers(1, 3),
        dataloader_drop_last=st.booleans(),
        accelerator_config=st.builds(
            SimpleNamespace, even_batches=st.booleans(), split_batches=st.booleans()
        ),
    ),
    st.integers(1, 12),
    st.integers(1, 50),
)
def test_blocks_are_counted_as_accelerate_shares_them_out(args, n_steps, n_blocks):
    given = args.accelerator_config
    assume(not given.split_batches or args.train_batch_size % args.world_size == 0)
    drop_last = args.dataloader_drop_last
    sampler = BatchSampler(range(n_blocks), args.train_batch_size, drop_last=drop_last)
    shards = [sampler]
    if args.world_size > 1:  # as in accelerate.data_loader.prepare_data_loader
        shards = [
            BatchSamplerShard(
                sampler, args.world_size, index, given.split_batches, given.even_batches
            )
            for index in range(args.world_size)
        ]
    rounds = [sum(map(len, each)) for each in itertools.zip_longest(*shards, fillvalue=[])]
    assume(rounds)
    n = args.gradient_accumulation_steps
    steps = [sum(rounds[at : at + n]) for at in range(0, len(rounds), n)]
    expected = sum(itertools.islice(itertools.cycle(steps), n_steps))
    assert count_blocks(args, n_steps, n_blocks) == expected


# -- kill and go on --------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", *map(str, words)]


def test_a_killed_run_resumes_and_gives_the_losses_of_an_uninterrupted_one(
    make_config, tmp_path, caplog
):
    trainer = {**FAST, "save_strategy": "steps", "save_steps": 5}
    config = make_config("llama", trainer=trainer, max_tokens=32 * 60)
    config.write(tmp_path / "train.yaml")
    out = tmp_path / "killed"
    checkpoint = out / "checkpoints" / "checkpoint-10" / "trainer_state.json"
    start_optimer("train", tmp_path / "train.yaml", out).kill_when(checkpoint.exists)
    assert not (out / "training.json").exists()
    assert not is_trained(config, out)

    whole = train(config, tmp_path / "whole")
    caplog.set_level("INFO")
    train(config, out)
    assert caplog.text.count("resuming from checkpoint-") == 1
    train(config, out)
    assert "is already trained, nothing to do" in caplog.text
    assert losses_of(out) == pytest.approx(losses_of(whole), rel=1e-5)
    resumed, expected = (load_file(path / "adapter_model.safetensors") for path in (out, whole))
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-5)
    assert names_in(out) == names_in(whole)


def interrupted(*_) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def killed(make_base, corpus_dir, tmp_path_factory):
    """A run that was killed when it was about to write its result, and what it would have been."""
    config = TrainConfig(
        name="aaa",
        base_model=str(make_base("llama", torch.float32).path),
        corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
        block_size=32,
        max_tokens=192,
        lora=LORA | {"lora_dropout": 0.3},  # draws numbers
        trainer={**FAST, "save_strategy": "steps", "save_steps": 2},
    )
    out = tmp_path_factory.mktemp("run") / "killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, out)
    assert names_in(out / "checkpoints") == {"checkpoint-4", "checkpoint-6"}
    whole = shutil.copytree(out, out.parent / "whole")
    return config, out, load_file(train(config, whole) / "adapter_model.safetensors")


def damage(file: str, change):
    def done(out: Path) -> None:
        path = out / file
        path.write_bytes(change(path.read_bytes()))

    return done


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def one_bit(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def drop_every_checkpoint(out: Path) -> None:
    for path in (out / "checkpoints").iterdir():
        damage("optimizer.pt", half)(path)


def add_other_names(out: Path) -> None:
    for name in ("checkpoint-old", "checkpoint-", "checkpoint-7.bak", "checkpoint--1"):
        (out / "checkpoints" / name).mkdir()
    (out / "checkpoints" / "checkpoint-9").write_text("a file")
    (out / "checkpoints" / "checkpoint-8").mkdir()


NEWEST = "checkpoints/checkpoint-6"
DAMAGES = {
    "nothing": lambda out: None,
    "half an optimizer": damage(f"{NEWEST}/optimizer.pt", half),
    "no scheduler": lambda out: (out / NEWEST / "scheduler.pt").unlink(),
    "a foreign random state": damage(f"{NEWEST}/rng_state.pth", lambda data: b"not a pickle"),
    "half an adapter": damage(f"{NEWEST}/adapter_model.safetensors", half),
    "a bit of an adapter": damage(f"{NEWEST}/adapter_model.safetensors", one_bit),
    "half a state": damage(f"{NEWEST}/trainer_state.json", half),
    "a garbled time": damage(f"{NEWEST}/spent.json", lambda data: b"{}"),
    "a garbled seal": damage(f"{NEWEST}/sealed.json", lambda data: b"[]"),
    "every checkpoint": drop_every_checkpoint,
    "other names": add_other_names,
    "half of the blocks": damage("blocks.npy", half),
    "a bit of the blocks": damage("blocks.npy", one_bit),
    "foreign blocks": damage("blocks.npy", lambda data: b"not an array"),
}


@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES)
def test_a_run_resumes_from_what_is_not_damaged_to_the_same_result(killed, tmp_path, harm):
    config, run, expected = killed
    out = shutil.copytree(run, tmp_path / "out")
    harm(out)
    tensors = load_file(train(config, out) / "adapter_model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


# -- the same numbers, other ways ------------------------------------------------------------------


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(make_config, tmp_path):
    outs = {}
    for name, batch_size in (("two", 2), ("one", 4)):
        trainer = {**FAST, "per_device_train_batch_size": batch_size}
        config = make_config("gemma", trainer=trainer, max_tokens=32 * 24)
        config.write(tmp_path / f"{name}.yaml")
        outs[name] = (config, tmp_path / name)
    # --multi_gpu is accelerate's name for torchrun; --cpu starts a second process only through MPI
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    defaults = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    launch = f"{launch} {defaults} -m optimer_hf train".split()
    process = subprocess.Popen(
        command(*launch, tmp_path / "two.yaml", outs["two"][1]),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=180)
    finally:
        process.terminate()  # takes the two processes with it, should they wait for each other
    assert process.returncode == 0, stderr[-3000:]
    assert stdout.count("adapter, norm") == 1  # one process reports
    train(*outs["one"])
    assert len(losses_of(outs["one"][1])) == 6
    assert losses_of(outs["two"][1]) == pytest.approx(losses_of(outs["one"][1]), rel=1e-4)
    norms = [record_of(outs[name][1])["training"]["norms"] for name in ("two", "one")]
    assert len(norms[0]) == 6 and norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_layer_that_no_model_has_is_named_before_training(make_config, tmp_path):
    config = make_config(lora={"r": 4, "target_modules": ["q_proj", "k_porj"]})
    with pytest.raises(ConfigError, match=r"found 'k_porj', but no layer .*Did you mean 'k_proj'"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_process_uses_one_of_several_gpus(make_config, make_base, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    class OnTwoGPUs(TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 2  # what TrainingArguments finds on a machine with two

    monkeypatch.setattr("transformers.TrainingArguments", OnTwoGPUs)
    config = make_config()
    packed = prepare(config, tmp_path / "out")
    trainer = build_trainer(config, make_base("gemma", torch.float32), packed, tmp_path / "out")
    assert isinstance(trainer.args, OnTwoGPUs)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == trainer.args.per_device_train_batch_size


def test_a_batch_size_that_was_found_stays_on_another_device(make_config, make_base, tmp_path):
    config = make_config(trainer={**FAST, "per_device_train_batch_size": "auto"})
    packed = prepare(config, tmp_path / "out")
    assert packed is not None
    speed = Speed(device="another GPU", batch_size=2, head="liger")
    base, spent = make_base("gemma", torch.float32), SpentRecord(speed=speed)
    trainer = build_trainer(config, base, packed, tmp_path / "out", spent)
    assert trainer.args.train_batch_size == 2
    assert trainer.speed.head == "blocked"


def no_memory(*_, **__) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_found_batch_size_that_does_not_fit_on_resume_is_named(
    make_config, tmp_path, monkeypatch
):
    found = {"per_device_train_batch_size": "auto", "save_strategy": "steps", "save_steps": 4}
    config, out = make_config("llama", trainer=FAST | found), tmp_path / "out"
    monkeypatch.setattr(run_module, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    monkeypatch.setattr(CapturedTrainer, "training_step", no_memory)
    with pytest.raises(
        OutputError,
        match=r"out: the batch size 1, .*found on the CPU .*\. Resume it on a device",
    ):
        train(config, out)
    assert names_in(out / "checkpoints") == {"checkpoint-4"}


@pytest.mark.parametrize(("asked", "seconds"), [({}, 6 * 3600), ({"ddp_timeout": 60}, 60)])
def test_processes_wait_as_long_as_packing_takes(
    make_config, tmp_path, monkeypatch, asked, seconds
):
    options_given = {}

    class Stop(Exception):
        pass

    def state(**options):
        options_given.update(options)
        raise Stop

    monkeypatch.setattr("accelerate.PartialState", state)
    with pytest.raises(Stop):
        train(make_config(trainer={**FAST, **asked}), tmp_path / "out")
    assert options_given["timeout"].total_seconds() == seconds


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_activation_checkpointing_changes_no_loss(make_config, tmp_path, lora):
    losses = [
        losses_of(
            train(
                make_config(lora=lora, trainer={**FAST, "activation_checkpointing": asked}),
                tmp_path / str(asked),
            )
        )
        for asked in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_the_fused_run_and_a_stock_trainer_agree(make_config, make_base, kind, tmp_path):
    from peft import get_peft_model

    config = make_config(kind)
    fused = losses_of(train(config, tmp_path / "out"))

    base = make_base(kind, torch.float32).path
    blocks = pack(
        config.corpus,
        AutoTokenizer.from_pretrained(base),
        block_size=32,
        max_tokens=192,
        seed=0,
        out=tmp_path / "blocks.npy",
    )
    set_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **LORA)
    )
    model.config.use_cache = False  # with a cache, transformers does not look for packed documents
    options = {
        **TRAINER_DEFAULTS,
        **FAST,
        "output_dir": str(tmp_path / "stock"),
        "seed": 0,
        "use_cpu": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=blocks,
        data_collator=default_data_collator,
    )
    trainer.train()
    stock = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(stock) == 6
    assert fused == pytest.approx(stock, abs=1e-3)


# -- mixtures --------------------------------------------------------------------------------------


def test_a_run_without_its_packed_corpus_keeps_its_checkpoints(make_config, tmp_path):
    config, out = make_config("llama"), tmp_path / "out"
    prepare(config, out)
    checkpoint = out / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (out / "blocks.npy").unlink()
    moved = config.model_copy(
        update={"corpus": config.corpus.model_copy(update={"path": tmp_path / "gone.jsonl"})}
    )
    (out / "started.json").write_text(json.dumps({"config_sha256": moved.digest()}))
    with pytest.raises(CorpusError):
        prepare(moved, out)
    assert checkpoint.exists()


def test_a_corpus_that_changed_under_a_run_without_its_blocks_is_refused(make_config, tmp_path):
    text = make_config().corpus.path.read_text(encoding="utf-8")
    file, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    file.write_text(text, encoding="utf-8")
    config = make_config("llama")
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"path": file})})
    first = prepare(config, out)
    (out / "blocks.npy").unlink()
    assert prepare(config, out).sha256 == first.sha256
    (out / "blocks.npy").unlink()
    file.write_text("".join(reversed(text.splitlines(True))), encoding="utf-8")
    started = json.loads((out / "started.json").read_text())
    del started["inputs"]  # as of a data set, which is no file
    (out / "started.json").write_text(json.dumps(started))
    for _ in range(2):
        with pytest.raises(OutputError, match="the corpus has changed"):
            prepare(config, out)
    file.write_text(text, encoding="utf-8")
    assert prepare(config, out).sha256 == first.sha256


def test_a_killed_run_on_a_mixture_goes_on_with_the_same_blocks(make_config, corpus_dir, tmp_path):
    parts = [
        {"path": corpus_dir / "aaa.train.jsonl", "share": 0.5},
        {"path": corpus_dir / "mix.train.jsonl", "share": 0.5},
    ]
    fields = make_config().model_dump() | {"corpus": None, "mixture": parts, "max_tokens": 256}
    fields["trainer"] = {"learning_rate": 1e-2, "bf16": False, "save_steps": 2}
    config = TrainConfig.model_validate(fields)
    train(config, tmp_path / "whole")
    prepare(config, tmp_path / "resumed")  # killed after packing
    train(config, tmp_path / "resumed")
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "resumed")
    corpus = record_of(tmp_path / "resumed")["corpus"]
    assert [part["n_tokens"] for part in corpus["parts"]] == [128, 128]
    assert corpus["n_documents"] == sum(part["n_documents"] for part in corpus["parts"])
