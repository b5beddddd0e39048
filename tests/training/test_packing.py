"""Packing against a naive loop, and packed documents against documents alone."""

import json
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.corpus.documents import SHUFFLE_BUFFER, read_documents, shuffle
from optimer_hf.errors import CorpusError
from optimer_hf.models.fused_loss import fuse_loss
from optimer_hf.models.head_loss import IGNORED_LABEL
from optimer_hf.training.config import MixturePart
from optimer_hf.training.packing import deal_out, pack, pack_mixture, segments
from optimer_hf.vectors.training_record import Part
from tests.support.corpora import write_jsonl
from tests.support.tiny import BOS, EOS, tiny_model

TOKENS = st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=30), max_size=12)


BLOCK_SIZES = st.integers(2, 17)


CONTEXTS = st.none() | st.integers(1, 20)


def naive_blocks(
    token_lists: list[list[int]], bos: int | None, eos: int | None, block_size: int, context=None
):
    """Pack token by token: a document, a block or a full context opens a segment; BOS opens it
    where a token still fits behind.
    """
    context = context or block_size
    done: list[list[list[int]]] = []
    block: list[list[int]] = []
    for tokens in token_lists:
        opens = True
        for token in [*tokens, *([] if eos is None else [eos])]:
            if opens:
                room = block_size - sum(map(len, block))
                has_room = min(room, context) >= 2
                block.append([bos] if bos is not None and has_room else [])
                opens = False
            block[-1].append(token)
            if sum(map(len, block)) == block_size:
                done.append(block)
                block, opens = [], True
            elif len(block[-1]) == context:
                opens = True
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


@given(TOKENS, st.sampled_from([BOS, None]), st.sampled_from([EOS, None]), BLOCK_SIZES, CONTEXTS)
def test_packing_equals_a_naive_token_by_token_loop(token_lists, bos, eos, block_size, context):
    packed = list(segments(token_lists, bos=bos, eos=eos, block_size=block_size, context=context))
    assert packed == naive_blocks(token_lists, bos, eos, block_size, context)


@given(TOKENS, BLOCK_SIZES)
def test_every_token_appears_once_in_order_and_only_the_tail_is_dropped(token_lists, block_size):
    packed = flat(list(segments(token_lists, bos=BOS, eos=EOS, block_size=block_size)))
    kept = [token for token in packed if token != BOS]
    everything = [token for tokens in token_lists for token in [*tokens, EOS]]
    assert kept == everything[: len(kept)]
    assert len(everything) - len(kept) < block_size


@given(TOKENS, BLOCK_SIZES)
def test_blocks_are_full_and_every_segment_but_a_last_one_of_one_token_starts_with_bos(
    token_lists, block_size
):
    for block in segments(token_lists, bos=BOS, eos=EOS, block_size=block_size):
        assert sum(map(len, block)) == block_size
        for segment in block:
            assert segment[0] == BOS or (len(segment) == 1 and segment is block[-1])
            assert BOS not in segment[1:]
            assert EOS not in segment[:-1]


def test_a_gap_of_one_takes_a_token_without_bos_and_the_document_continues_with_bos():
    packed = list(segments([[10, 11], [20, 21, 22, 23]], bos=BOS, eos=EOS, block_size=5))
    assert packed == [[[BOS, 10, 11, EOS], [20]], [[BOS, 21, 22, 23, EOS]]]


def test_a_gap_of_one_at_the_end_of_a_document_takes_its_eos():
    packed = list(segments([[10, 11, 12, 13]], bos=BOS, eos=EOS, block_size=3))
    assert packed == [[[BOS, 10, 11]], [[BOS, 12, 13]]]  # EOS alone does not fill a block


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


def test_no_bos_is_added_for_a_tokenizer_that_adds_none(tmp_path, no_bos_tokenizer):
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


def test_a_corpus_with_fewer_tokens_than_requested_is_refused_with_both_counts(tmp_path, tokenizer):
    config = write_jsonl(tmp_path / "a.jsonl", ["abcdef"] * 200)
    with pytest.raises(
        CorpusError,
        match="200 documents fill whole blocks with 1,600 tokens, but max_tokens asks for 10,000",
    ):
        pack(
            config, tokenizer, block_size=8, max_tokens=10_000, seed=0, out=tmp_path / "blocks.npy"
        )


def test_a_corpus_that_does_not_fill_one_block_is_refused(tmp_path, tokenizer):
    config = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    message = (
        "1 document fills whole blocks with 0 tokens, but block_size asks for 64. .* block_size"
    )
    for max_tokens in (None, 3, 100):  # less than two blocks are one
        settings = {"block_size": 64, "max_tokens": max_tokens, "seed": 0}
        with pytest.raises(CorpusError, match=message):
            pack(config, tokenizer, **settings, out=tmp_path / "blocks.npy")


def test_a_text_longer_than_the_context_of_the_model_is_packed_without_a_warning(
    tmp_path, tokenizer
):
    config = write_jsonl(tmp_path / "a.jsonl", ["word " * 500])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = pack(
            config, tokenizer, block_size=64, max_tokens=None, seed=0, out=tmp_path / "blocks.npy"
        )
    assert packed.n_tokens > tokenizer.model_max_length


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


def part(path, share, **fields) -> MixturePart:
    return MixturePart(path=path, share=share, **fields)


def test_a_mixture_has_exactly_the_requested_shares(tmp_path, tokenizer, corpus_dir):
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
def test_shares_are_dealt_out_to_within_one_of_their_exact_size(sizes, n):
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
        CorpusError,
        match=r"a.jsonl: 4 documents fill whole blocks with 32 tokens, but its share of 0.5",
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
