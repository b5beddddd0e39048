"""Packing against a naive loop, and packed documents against documents alone."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from optimer_hf.corpus import texts as texts_module
from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.corpus.documents import SHUFFLE_BUFFER, read_documents, shuffle
from optimer_hf.errors import CorpusError
from optimer_hf.models.head import IGNORED_LABEL, fuse_loss
from optimer_hf.training.config import MixturePart
from optimer_hf.training.packing import Part, deal_out, pack, pack_mixture, segments
from tests.support.tiny import BOS, EOS, tiny_model

TOKENS = st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=30), max_size=12)
BLOCK_SIZES = st.integers(2, 17)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> CorpusConfig:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return CorpusConfig(path=path)


def naive_blocks(token_lists: list[list[int]], bos: int | None, eos: int | None, block_size: int):
    """Pack token by token: a document, or a block, opens a segment; BOS opens it where a token
    still fits behind.
    """
    done: list[list[list[int]]] = []
    block: list[list[int]] = []
    for tokens in token_lists:
        opens = True
        for token in [*tokens, *([] if eos is None else [eos])]:
            if opens:
                room = block_size - sum(map(len, block))
                block.append([bos] if bos is not None and room >= 2 else [])
                opens = False
            block[-1].append(token)
            if sum(map(len, block)) == block_size:
                done.append(block)
                block, opens = [], True
    return done


def flat(blocks: list[list[list[int]]]) -> list[int]:
    return [token for block in blocks for segment in block for token in segment]


@pytest.fixture
def no_bos_tokenizer(tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that has a BOS token but puts none before a text, as Qwen's and GPT-2's."""
    raw = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


# -- segments --------------------------------------------------------------------------------------


@given(TOKENS, st.sampled_from([BOS, None]), st.sampled_from([EOS, None]), BLOCK_SIZES)
def test_packing_equals_a_naive_token_by_token_loop(token_lists, bos, eos, block_size):
    packed = list(segments(token_lists, bos=bos, eos=eos, block_size=block_size))
    assert packed == naive_blocks(token_lists, bos, eos, block_size)


@given(TOKENS, BLOCK_SIZES)
def test_every_token_appears_once_in_order_and_only_the_tail_is_dropped(token_lists, block_size):
    packed = flat(list(segments(token_lists, bos=BOS, eos=EOS, block_size=block_size)))
    kept = [token for token in packed if token != BOS]
    everything = [token for tokens in token_lists for token in [*tokens, EOS]]
    assert kept == everything[: len(kept)]
    assert len(everything) - len(kept) < block_size


@given(TOKENS, BLOCK_SIZES)
def test_blocks_are_full_and_every_segment_but_a_gap_of_one_starts_with_bos(
    token_lists, block_size
):
    for block in segments(token_lists, bos=BOS, eos=EOS, block_size=block_size):
        assert sum(map(len, block)) == block_size
        for segment in block:
            assert segment[0] == BOS or (len(segment) == 1 and segment is block[-1])
            assert BOS not in segment[1:]
            assert EOS not in segment[:-1]


def test_a_gap_of_one_takes_a_token_without_bos_and_the_document_goes_on_with_bos():
    packed = list(segments([[10, 11], [20, 21, 22, 23]], bos=BOS, eos=EOS, block_size=5))
    assert packed == [[[BOS, 10, 11, EOS], [20]], [[BOS, 21, 22, 23, EOS]]]


def test_a_gap_of_one_at_the_end_of_a_document_takes_its_eos():
    packed = list(segments([[10, 11, 12, 13]], bos=BOS, eos=EOS, block_size=3))
    assert packed == [[[BOS, 10, 11]], [[BOS, 12, 13]]]  # EOS alone does not fill a block


# -- documents -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "opener"), [("a.jsonl", open), ("a.jsonl.xz", lzma.open), ("a.jsonl.gz", gzip.open)]
)
def test_jsonl_gives_its_texts_in_file_order_whatever_its_compression(tmp_path, name, opener):
    texts = ["first", "zweitens ü", "日本語\nzwei Zeilen"]
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("\n\n".join(json.dumps({"text": text}) for text in texts))
    assert list(read_documents(CorpusConfig(path=tmp_path / name))) == texts


@pytest.mark.parametrize(
    ("name", "opener"), [("a.txt", open), ("a.md", open), ("a.txt.gz", gzip.open)]
)
def test_plain_text_is_one_document(tmp_path, name, opener):
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("line one\n\nline two\n")
    assert list(read_documents(CorpusConfig(path=tmp_path / name))) == ["line one\n\nline two\n"]


def test_text_field_names_another_field(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x", "y"], field="content")
    assert list(read_documents(CorpusConfig(path=tmp_path / "a.jsonl", text_field="content"))) == [
        "x",
        "y",
    ]


def test_a_csv_file_is_streamed_by_datasets(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\nhello,1\nworld,2\n")
    assert list(read_documents(CorpusConfig(path=tmp_path / "a.csv"))) == ["hello", "world"]


def test_a_csv_file_without_the_text_field_is_an_error_that_names_the_fields(tmp_path):
    (tmp_path / "a.csv").write_text("body,n\nhello,1\n")
    with pytest.raises(
        CorpusError, match=r"a\.csv: no text in field 'text'; found \['body', 'n'\]"
    ):
        list(read_documents(CorpusConfig(path=tmp_path / "a.csv")))


def test_a_missing_file_of_any_kind_is_named(tmp_path):
    for name in ("gone.jsonl", "gone.txt", "gone.csv"):
        with pytest.raises(CorpusError, match=name.replace(".", r"\.")):
            list(read_documents(CorpusConfig(path=tmp_path / name)))


def test_a_malformed_line_is_named_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": \n')
    with pytest.raises(CorpusError, match=r"a\.jsonl:3: not a JSON object"):
        list(read_documents(CorpusConfig(path=tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"body": "x", "id": 1}', r"\['body', 'id'\]"),
        ('{"text": 3}', "a value of type int there"),
        ('["x"]', "list"),
    ],
)
def test_a_line_without_the_text_field_is_named_with_what_was_found(tmp_path, line, found):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(
        CorpusError, match=rf"a\.jsonl:2: no text in field 'text'; found {found}. Set `text_field`"
    ):
        list(read_documents(CorpusConfig(path=tmp_path / "a.jsonl")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.txt"])
def test_a_file_that_is_not_what_its_name_says_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 neither UTF-8 nor compressed")
    with pytest.raises(CorpusError, match=name.replace(".", r"\.")):
        list(read_documents(CorpusConfig(path=tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a\\ud800b"}', r"a\.jsonl:1: contains half a character"),
        ("a.jsonl", "[" * 10**5, r"a\.jsonl:1: is nested too deeply"),
        ("a.foo", "x", r"a\.foo: found a file that ends in '\.foo'\. Expected \.jsonl"),
        ("a.parquet.gz", "x", r"found a file that ends in '\.gz'\. Expected \.jsonl"),
        ("a.zst", "x", r"found a file that ends in '\.zst'\. Expected \.jsonl"),
        ("a.parquet", "x", r"a\.parquet: `datasets` cannot read it"),
    ],
)
def test_text_that_no_tokenizer_takes_and_unknown_formats_are_refused(
    tmp_path, name, text, message
):
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError, match=message):
        list(read_documents(CorpusConfig(path=tmp_path / name)))


def test_a_truncated_archive_is_an_error_that_names_it(tmp_path):
    whole = lzma.compress(json.dumps({"text": "x" * 1000}).encode())
    (tmp_path / "a.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"a\.jsonl\.xz"):
        list(read_documents(CorpusConfig(path=tmp_path / "a.jsonl.xz")))


def test_a_corpus_has_exactly_one_source(tmp_path):
    with pytest.raises(ValidationError, match="exactly one of 'path'"):
        CorpusConfig()
    with pytest.raises(ValidationError, match="exactly one of 'path'"):
        CorpusConfig(path=tmp_path / "a.jsonl", dataset="org/name")


def test_the_name_of_a_corpus_is_never_a_path(tmp_path):
    assert CorpusConfig(path=tmp_path / "a.jsonl").name == "a.jsonl"
    assert CorpusConfig(dataset="org/name").name == "org/name"


# -- shuffling -------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 3))
def test_shuffling_loses_and_repeats_no_text_and_a_seed_fixes_the_order(n, buffer_size, seed):
    texts = [str(i) for i in range(n)]
    result = list(shuffle(texts, seed, buffer_size))
    assert sorted(result) == sorted(texts)
    assert result == list(shuffle(texts, seed, buffer_size))


def test_shuffling_changes_the_order_and_another_seed_gives_another():
    texts = [str(i) for i in range(100)]
    assert texts != list(shuffle(texts, 0)) != list(shuffle(texts, 1))


def test_shuffling_reads_one_text_ahead_of_its_buffer():
    n_read = 0

    def texts():
        nonlocal n_read
        for n_read in range(1, 1001):
            yield str(n_read)

    stream = shuffle(texts(), 0, 10)
    for n_yielded in range(1, 6):
        next(stream)
        assert n_read == 10 + n_yielded


# -- pack ------------------------------------------------------------------------------------------


def test_packed_blocks_on_disk_equal_the_naive_loop_over_shuffled_documents(
    tmp_path, tokenizer, corpus_dir
):
    config = CorpusConfig(path=corpus_dir / "aaa.train.jsonl")
    packed = pack(
        config, tokenizer, block_size=32, max_tokens=None, seed=3, out=tmp_path / "blocks.npy"
    )
    token_lists = [tokenizer.encode(text)[1:] for text in shuffle(read_documents(config), 3)]
    expected = naive_blocks(token_lists, BOS, EOS, 32)
    assert packed.blocks[:, 0].tolist() == [flat([block]) for block in expected]
    positions = [[i for segment in block for i in range(len(segment))] for block in expected]
    assert packed.blocks[:, 1].tolist() == positions
    assert packed.n_documents == len(token_lists) == 120
    assert packed.n_tokens == 32 * len(expected) == 32 * len(packed)
    assert [path.name for path in tmp_path.iterdir()] == ["blocks.npy"]


def test_labels_are_the_tokens_except_the_first_of_each_segment(tmp_path, tokenizer, corpus_dir):
    config = CorpusConfig(path=corpus_dir / "mix.train.jsonl")
    packed = pack(
        config, tokenizer, block_size=64, max_tokens=640, seed=0, out=tmp_path / "blocks.npy"
    )
    for i in range(len(packed)):
        example = packed[i]
        first = example["position_ids"] == 0
        assert (example["labels"][first] == IGNORED_LABEL).all()
        assert (example["labels"][~first] == example["input_ids"][~first]).all()
        assert {array.dtype for array in example.values()} == {np.dtype("int64")}


def test_a_seed_fixes_the_packed_blocks_and_another_seed_changes_them(
    tmp_path, tokenizer, corpus_dir
):
    config = CorpusConfig(path=corpus_dir / "aaa.train.jsonl")
    sha256 = [
        pack(
            config, tokenizer, block_size=32, max_tokens=320, seed=seed, out=tmp_path / f"{i}.npy"
        ).sha256
        for i, seed in enumerate((0, 0, 1))
    ]
    assert sha256[0] == sha256[1] != sha256[2]


def test_a_tokenizer_that_puts_no_bos_gets_none(tmp_path, no_bos_tokenizer):
    config = write_jsonl(tmp_path / "a.jsonl", ["ab", "cdefghij", "klm"] * 10)
    packed = pack(
        config, no_bos_tokenizer, block_size=8, max_tokens=None, seed=0, out=tmp_path / "blocks.npy"
    )
    assert no_bos_tokenizer.bos_token_id == BOS
    assert BOS not in packed.blocks[:, 0]
    assert EOS in packed.blocks[:, 0]


def test_packing_stops_at_max_tokens_rounded_down_to_whole_blocks(tmp_path, tokenizer, corpus_dir):
    config = CorpusConfig(path=corpus_dir / "aaa.train.jsonl")
    packed = pack(
        config, tokenizer, block_size=32, max_tokens=100, seed=0, out=tmp_path / "blocks.npy"
    )
    assert packed.n_tokens == 96
    assert packed.n_documents < 120


def test_a_corpus_larger_than_the_shuffle_buffer_is_read_no_further_than_needed(
    tmp_path, tokenizer
):
    good = json.dumps({"text": "abcdef"}) + "\n"
    path = tmp_path / "big.jsonl"
    path.write_text(good * (SHUFFLE_BUFFER + 100) + "broken\n")
    config = CorpusConfig(path=path)
    packed = pack(
        config, tokenizer, block_size=8, max_tokens=400, seed=0, out=tmp_path / "blocks.npy"
    )
    assert (
        packed.n_documents == 50
    )  # `BOS abcdef EOS` fills a block; the broken line was never reached
    with pytest.raises(CorpusError, match=rf"big\.jsonl:{SHUFFLE_BUFFER + 101}: not a JSON object"):
        pack(config, tokenizer, block_size=8, max_tokens=8 * 101, seed=0, out=tmp_path / "more.npy")


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_an_empty_corpus_is_refused(tmp_path, tokenizer, content):
    (tmp_path / "a.jsonl").write_text(content)
    config = CorpusConfig(path=tmp_path / "a.jsonl")
    with pytest.raises(CorpusError, match=r"a\.jsonl: has no text"):
        pack(config, tokenizer, block_size=8, max_tokens=None, seed=0, out=tmp_path / "blocks.npy")


def test_a_corpus_with_fewer_tokens_than_asked_is_refused_with_both_counts(tmp_path, tokenizer):
    config = write_jsonl(tmp_path / "a.jsonl", ["abcdef"] * 200)
    with pytest.raises(
        CorpusError, match="holds 1,600 tokens in 200 documents, but max_tokens asks for 10,000"
    ):
        pack(
            config, tokenizer, block_size=8, max_tokens=10_000, seed=0, out=tmp_path / "blocks.npy"
        )


def test_a_corpus_that_does_not_fill_one_block_is_refused(tmp_path, tokenizer):
    config = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    with pytest.raises(CorpusError, match="holds 0 tokens in 1 documents"):
        pack(config, tokenizer, block_size=64, max_tokens=None, seed=0, out=tmp_path / "blocks.npy")


def test_a_text_longer_than_the_model_takes_is_packed_without_a_warning(tmp_path, tokenizer):
    config = write_jsonl(tmp_path / "a.jsonl", ["word " * 500])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = pack(
            config, tokenizer, block_size=64, max_tokens=None, seed=0, out=tmp_path / "blocks.npy"
        )
    assert packed.n_tokens > tokenizer.model_max_length


# -- documents in one block do not see each other --------------------------------------------------


@pytest.fixture
def packed(tmp_path, tokenizer):
    """Blocks with several documents each, one longer than Gemma's sliding window of 64, one that is
    cut.
    """
    texts = [
        "alpha beta",
        "x" * 90,
        "the cat sat on the mat",
        "tiny",
        "another text of middling length",
    ] * 3
    return pack(
        write_jsonl(tmp_path / "a.jsonl", texts),
        tokenizer,
        block_size=128,
        max_tokens=None,
        seed=0,
        out=tmp_path / "blocks.npy",
    )


def starts_of(example) -> list[int]:
    return [*np.flatnonzero(example["position_ids"] == 0).tolist(), len(example["position_ids"])]


def test_packed_documents_get_the_logits_they_get_alone(kind, packed):
    model = tiny_model(kind).eval()
    n_segments = 0
    for index in range(len(packed)):
        example = {
            name: torch.from_numpy(array).unsqueeze(0) for name, array in packed[index].items()
        }
        with torch.no_grad():
            together = model(
                input_ids=example["input_ids"],
                position_ids=example["position_ids"],
                use_cache=False,
            ).logits[0]
            starts = starts_of(packed[index])
            for start, end in pairwise(starts):
                alone = model(input_ids=example["input_ids"][:, start:end], use_cache=False).logits[
                    0
                ]
                torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-5)
                n_segments += 1
    assert n_segments > 2 * len(packed)


def test_the_training_loss_of_a_block_is_that_of_its_documents_alone(kind, packed):
    stock, fused = tiny_model(kind), tiny_model(kind)
    assert fuse_loss(fused)
    for index in range(len(packed)):
        example = packed[index]
        loss = fused(
            **{name: torch.from_numpy(array).unsqueeze(0) for name, array in example.items()}
        ).loss
        total, n_scored = 0.0, 0
        starts = starts_of(example)
        for start, end in pairwise(starts):
            ids = torch.from_numpy(example["input_ids"][start:end])
            with torch.no_grad():
                logits = stock(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
            total += torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
            n_scored += len(ids) - 1
        assert loss.item() == pytest.approx(total / n_scored, rel=1e-5)


# -- mixtures --------------------------------------------------------------------------------------


def part(path, share, **fields) -> MixturePart:
    return MixturePart(path=path, share=share, **fields)


def test_a_mixture_has_exactly_the_shares_asked_for(tmp_path, tokenizer, corpus_dir):
    mixture = [
        part(corpus_dir / "aaa.train.jsonl", 0.3),
        part(corpus_dir / "mix.train.jsonl", 0.7),
    ]
    packed = pack_mixture(
        mixture, tokenizer, block_size=32, max_tokens=32 * 20, seed=5, out=tmp_path / "blocks.npy"
    )
    assert [p.n_tokens for p in packed.parts] == [32 * 6, 32 * 14]
    for number, config, blocks in (
        (0, mixture[0], packed.blocks[:6]),
        (1, mixture[1], packed.blocks[6:]),
    ):
        alone = pack(
            config,
            tokenizer,
            block_size=32,
            max_tokens=packed.parts[number].n_tokens,
            seed=5,
            out=tmp_path / f"{number}.npy",
        )
        assert (alone.blocks == blocks).all()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"blocks.npy", "0.npy", "1.npy"}, "nothing else is left behind"


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=6),
    st.integers(1, 5000),
)
def test_things_are_dealt_out_within_one_of_their_exact_part(sizes, n):
    shares = [size / sum(sizes) for size in sizes]
    counts = deal_out(shares, n)
    assert sum(counts) == n
    assert all(abs(c - share * n) < 1 + 1e-6 for c, share in zip(counts, shares, strict=True))


def test_a_corpus_smaller_than_its_share_is_refused_unless_it_may_be_repeated(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", ["abcdef"] * 4)  # 4 x 8 tokens with BOS and EOS
    write_jsonl(tmp_path / "b.jsonl", ["ghijkl"] * 100)
    settings = {"block_size": 8, "max_tokens": 160, "seed": 0, "out": tmp_path / "blocks.npy"}
    mixture = [part(tmp_path / "a.jsonl", 0.5), part(tmp_path / "b.jsonl", 0.5)]
    with pytest.raises(
        CorpusError, match=r"a.jsonl: holds 32 tokens in 4 documents, but its share of 0.5 asks for"
    ):
        pack_mixture(mixture, tokenizer, **settings)
    mixture[0] = part(tmp_path / "a.jsonl", 0.5, upsample=True)
    packed = pack_mixture(mixture, tokenizer, **settings)
    assert packed.parts[0] == Part("a.jsonl", 80, 4, 6)
    assert packed.parts[1] == Part("b.jsonl", 80, 10, 0)


def test_an_empty_corpus_is_not_repeated_for_ever(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    mixture = [part(tmp_path / "a.jsonl", 1.0, upsample=True)]
    with pytest.raises(CorpusError, match="has no text"):
        pack_mixture(
            mixture, tokenizer, block_size=8, max_tokens=80, seed=0, out=tmp_path / "blocks.npy"
        )


def test_a_number_of_thousands_of_digits_is_an_error_of_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "n": ' + "1" * 5000 + "}\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:2: not a JSON object"):
        list(read_documents(CorpusConfig(path=path)))


# -- other people's files --------------------------------------------------------------------------

UNTIDY = [
    "2024-01-01",
    "12:30",
    "1e5",
    "NA",
    "null",
    "true",
    "007",
    'with "quotes", a comma\tand a tab',
    "two\nlines",
    "日本語",
]


def as_rows(kind: str, rows: list[dict[str, str | None]]) -> str:
    """Return rows in a text format."""
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row) + "\n" for row in rows)
    if kind == ".json":
        return json.dumps(rows, indent=1)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["n", "text"], delimiter="," if kind == ".csv" else "\t")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_any(path: Path, text: str) -> Path:
    """Write a text, compressed as the name says."""
    data, kind = text.encode(), path.suffix.lower()
    if kind == ".zst":
        half = len(data) // 2  # two frames, as parallel compressors write them
        data = b"".join(pa.compress(x, "zstd", asbytes=True) for x in (data[:half], data[half:]))
    packed = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.get(kind, bytes)
    path.write_bytes(packed(data))
    return path


def texts(path: Path, **settings) -> list[str]:
    return list(read_documents(CorpusConfig(path=path, **settings)))


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".bz2", ".zst", ".GZ"])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".JSONL"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_is_the_text_that_stands_in_the_file(tmp_path, kind, compression, mark):
    rows = [{"n": str(number), "text": text} for number, text in enumerate(UNTIDY)]
    path = write_any(tmp_path / f"a{kind}{compression}", mark + as_rows(kind.lower(), rows))
    assert texts(path) == UNTIDY


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "A.PARQUET"])
def test_tables_give_the_texts_of_their_column(tmp_path, name):
    table = pa.table({"n": list(range(len(UNTIDY) + 1)), "text": [*UNTIDY, None]})
    if name.endswith(".arrow"):
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, tmp_path / name)
    assert texts(tmp_path / name) == UNTIDY


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_rows_whose_text_is_null_are_left_out_and_counted(tmp_path, kind, caplog):
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}, {"text": None}]
    path = write_any(tmp_path / f"nulls{tmp_path.name}{kind}", as_rows(kind, rows))
    assert texts(path) == ["a", "b"]
    assert f"{path.name}: skipped 2 rows whose 'text' is null" in caplog.text


def test_a_json_array_is_read_element_by_element_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "CHUNK", 7)
    rows = [{"text": "x" * n} for n in range(40)]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(" \n" + json.dumps(rows, indent=indent) + "\n")
        assert texts(tmp_path / "a.json") == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"text": "a"}, {"text": ', r"a\.json: row 2: not a JSON value"),
        ("a.json", '[{"text": "a"}', r"a\.json: row 2: not a JSON value"),
        ("a.json", '["a"]', r"a\.json: row 1: no text in field 'text'; found str"),
        ("a.json", '{"text":\n "a"}', r"a\.json:1: not a JSON object"),
        ("a.jsonl", '{"text": "' + "x" * 200 + '"}', r"a\.jsonl:1: the line has more than 100"),
        ("a.json", '[{"text": "' + "x" * 300 + '"}]', r"a\.json: row 1: not a JSON value"),
        ("a.csv", 'text\n"' + "x" * 50 + "\n" + "x" * 60, r"a\.csv: cannot be read .*field larger"),
        ("a.csv", 'text\n"x', r"a\.csv: cannot be read .*unexpected end"),
        ("a.txt", "short\n" + "x" * 200, r"a\.txt:2: the line has more than 100"),
    ],
)
def test_damaged_and_endless_rows_are_named(tmp_path, monkeypatch, name, text, message):
    monkeypatch.setattr(texts_module, "LONGEST_ROW", 100)
    monkeypatch.setattr(texts_module, "CHUNK", 10)
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError, match=message):
        texts(tmp_path / name)


def test_a_large_plain_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "LONGEST_TEXT", 50)
    lines = [f"line {number}\n" for number in range(30)]
    (tmp_path / "a.txt").write_text("".join(lines))
    found = texts(tmp_path / "a.txt")
    assert "".join(found) == "".join(lines)
    assert all(len(part) <= 50 and part.endswith("\n") for part in found)


def test_a_small_archive_of_a_long_text_is_read_in_parts(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        for _ in range(64):
            file.write(("x" * 1023 + "\n") * 1024)
    tracemalloc.start()
    n_characters = sum(map(len, read_documents(CorpusConfig(path=tmp_path / "a.txt.gz"))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_characters == 64 * 2**20
    assert peak < 32 * 2**20


def test_a_folder_and_a_pattern_give_their_shards_in_order_of_name(tmp_path):
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl.gz", "more/c.JSONL"):
        kind = ".jsonl"
        write_any(folder / name, as_rows(kind, [{"text": name}]) if kind else "")
    write_any(folder / "README.md", "what it is")
    write_any(folder / ".hidden.jsonl", "damaged")
    assert sorted(texts(folder)) == ["a.jsonl.gz", "b.jsonl", "more/c.JSONL"]
    assert texts(folder / "*.jsonl*") == ["a.jsonl.gz", "b.jsonl"]
    assert texts(folder / "**" / "*.[Jj]*") == ["a.jsonl.gz", "b.jsonl", "more/c.JSONL"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    write_any(tmp_path / "a[1].jsonl", as_rows(".jsonl", [{"text": "a"}]))
    assert texts(tmp_path / "a[1].jsonl") == ["a"]


def test_a_data_set_saved_by_datasets_is_read_whole(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no shards in this folder"),
        (["notes.pdf"], "no shards in this folder"),
        (["a.jsonl", "b.csv"], r"several formats \(\.csv, \.jsonl\)\. Use a pattern to select"),
        (["train-0.jsonl", "test-0.jsonl"], r"several splits \(train-0\.jsonl and test-0\.jsonl"),
        (["data/a.jsonl", "validation/a.jsonl"], "several splits"),
    ],
)
def test_a_folder_that_is_no_single_corpus_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_any(tmp_path / name, "")
    with pytest.raises(CorpusError, match=message):
        texts(tmp_path)


@pytest.fixture
def linked(tmp_path):
    """A folder with a shard, a link to it, a link to a folder of shards and one to itself."""
    folder = tmp_path / "linked"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    write_any(folder / "a.jsonl", as_rows(".jsonl", [{"text": "a"}]))
    write_any(tmp_path / "elsewhere" / "b.jsonl", as_rows(".jsonl", [{"text": "b"}]))
    (folder / "again.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "self").symlink_to(folder)
    return folder


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl"])
def test_every_shard_that_links_lead_to_is_read_once(linked, pattern):
    assert texts(linked / pattern) == ["a", "b"]


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
def test_a_link_to_a_shard_that_is_not_there_is_refused(linked, pattern):
    (linked / "z.jsonl").symlink_to("nowhere")
    with pytest.raises(CorpusError, match=r"z\.jsonl: is a link to nowhere, which does not exist"):
        texts(linked / pattern)


@pytest.mark.parametrize("pattern", ["", "*.jsonl*"])
def test_a_shard_and_its_compressed_copy_are_refused(tmp_path, pattern):
    for name in ("a.jsonl", "a.jsonl.gz"):
        write_any(tmp_path / name, as_rows(".jsonl", [{"text": "a"}]))
    with pytest.raises(CorpusError, match=r"a\.jsonl\.gz: seems to be a copy of a\.jsonl"):
        texts(tmp_path / pattern)


def test_what_map_leaves_in_a_saved_data_set_is_not_read(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path)
    load_from_disk(tmp_path).map(lambda row: {"text": row["text"] + "!"})
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    assert texts(tmp_path) == ["a", "b"]
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(CorpusError, match=r"lacks '.*arrow', which state\.json names"):
        texts(tmp_path)


def test_a_saved_dict_of_one_split_is_read_and_of_two_is_refused(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict(train=rows).save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "one") == ["a", "b"]
    with pytest.raises(CorpusError, match=r"the splits \['test', 'train'\].* path: two/train"):
        texts(tmp_path / "two")
    assert texts(tmp_path / "two" / "train") == ["a", "b"]


def test_an_empty_shard_of_a_table_is_read_as_empty(tmp_path):
    for name, found in (("a", []), ("b", ["x"])):
        pq.write_table(
            pa.table({"text": pa.array(found, pa.string())}), tmp_path / f"{name}.parquet"
        )
    assert texts(tmp_path) == ["x"]


def test_texts_about_a_corpus_of_plain_text_are_left_out(tmp_path):
    for name in ("a.txt", "README.md", "LICENSE.txt"):
        write_any(tmp_path / name, name)
    assert texts(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', r"found '\[\{\"text.* after the array"),
        ("a.json", '[{"text": "a"}]' + " " * 3 * 2**20 + "x", "found 'x' after the array"),
        ("a.csv", "n,text\n1,b\n2,Hello, world\n", r"a\.csv:3: has more values than the 2 columns"),
        ("a.csv", "text,text\na,b\n", r"a\.csv: has 2 columns 'text', expected one"),
        (
            "a.txt",
            "version https://git-lfs.github.com/spec/v1\noid sha256:a\n",
            "Git LFS pointer",
        ),
    ],
)
def test_a_file_of_which_something_would_be_lost_is_refused(tmp_path, name, text, message):
    with pytest.raises(CorpusError, match=message):
        texts(write_any(tmp_path / name, text))


def test_plain_text_may_be_called_testing(tmp_path):
    for name in ("guide.md", "install.md", "testing.md"):
        write_any(tmp_path / name, name)
    assert texts(tmp_path) == ["guide.md", "install.md", "testing.md"]


def test_a_pattern_without_a_match_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"\*\.jsonl: no file matches this pattern"):
        texts(tmp_path / "*.jsonl")


def test_a_data_set_takes_the_arguments_of_load_dataset(tmp_path):
    write_any(tmp_path / "a.csv", "text\nfirst\n")
    write_any(tmp_path / "b.csv", "text\nsecond\n")
    for files in ("./a.csv", ["./b.csv"], {"train": "./a.csv", "other": ["./b.csv"]}):
        config = CorpusConfig.model_validate(
            {"dataset": "csv", "name": "default", "data_files": files},
            context={"folder": tmp_path},
        )
        assert config.dataset_config == "default"
        assert list(read_documents(config)) == (["second"] if files == ["./b.csv"] else ["first"])


def test_arguments_of_load_dataset_beside_a_path_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="'data_files' goes with 'dataset'"):
        CorpusConfig(path=tmp_path / "a.jsonl", data_files="b.jsonl")


def test_shuffling_holds_no_more_characters_than_it_may():
    held, most = 0, 0

    def source():
        nonlocal held, most
        for number in range(200):
            text = chr(97 + number % 26) * (1 + number % 90)
            held += len(text)
            most = max(most, held)
            yield text

    found = []
    for text in shuffle(source(), seed=1, buffer_size=50, n_characters=300):
        held -= len(text)
        found.append(text)
    assert sorted(found) == sorted(chr(97 + n % 26) * (1 + n % 90) for n in range(200))
    assert most <= 300 + 2 * 90


def test_texts_that_changed_in_a_folder_change_the_fingerprint_of_its_corpus(tmp_path):
    config = CorpusConfig(path=tmp_path)
    assert config.fingerprint() is None
    write_any(tmp_path / "a.jsonl", "{}")
    before = config.fingerprint()
    write_any(tmp_path / "a.jsonl", "{} ")
    assert None not in (before, config.fingerprint())
    assert before != config.fingerprint()
