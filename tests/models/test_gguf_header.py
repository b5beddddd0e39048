"""Damaged GGUF files: converted, or refused by name before anything large is read."""

import resource
import shutil
import struct

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from optimer_hf.errors import ModelError, OptimerError
from optimer_hf.models.gguf_conversion import convert_gguf


@pytest.fixture(scope="module")
def whole(gguf_file) -> bytes:
    return gguf_file.read_bytes()


def replace_after(data: bytes, before: bytes, after: bytes, skip: int = 0) -> bytes:
    """Return bytes with those that follow a text (and `skip` more) replaced."""
    at = data.index(before) + len(before) + skip
    return data[:at] + after + data[at + len(after) :]


HUGE = struct.pack("<Q", 2**63)


DIRECTED = {
    "magic alone": lambda data: b"GGUF",
    "version 1": lambda data: replace_after(data, b"GGUF", struct.pack("<I", 1)),
    "big-endian": lambda data: replace_after(data, b"GGUF", struct.pack(">I", 3)),
    "2^63 tensors": lambda data: replace_after(data, b"GGUF", HUGE, 4),
    "2^63 values": lambda data: replace_after(data, b"GGUF", HUGE, 12),
    "as many values as bytes": lambda data: replace_after(
        data, b"GGUF", struct.pack("<Q", len(data)), 12
    ),
    "2^31 layers": lambda data: replace_after(data, b"block_count", struct.pack("<I", 2**31), 4),
    "a million layers": lambda data: replace_after(
        data, b"block_count", struct.pack("<I", 10**6), 4
    ),
    "no layers": lambda data: replace_after(data, b"block_count", struct.pack("<I", 0), 4),
    "2^31 heads": lambda data: replace_after(data, b".head_count", struct.pack("<I", 2**31), 4),
    "no heads": lambda data: replace_after(data, b".head_count", struct.pack("<I", 0), 4),
    "2^31 columns": lambda data: replace_after(
        data, b"embedding_length", struct.pack("<I", 2**31), 4
    ),
    "a layer of 2^31": lambda data: replace_after(
        data, b"feed_forward_length", struct.pack("<I", 2**31 - 1), 4
    ),
    "2^62 tokens": lambda data: replace_after(data, b"ggml.tokens", struct.pack("<Q", 2**62), 8),
    "an array of arrays": lambda data: replace_after(data, b"ggml.tokens", struct.pack("<I", 9), 4),
    "a text of 2^63 bytes": lambda data: replace_after(data, b"ggml.model", HUGE, 4),
    "a value of type 77": lambda data: replace_after(data, b"block_count", struct.pack("<I", 77)),
    "a tensor of 2^62 rows": lambda data: replace_after(data, b"token_embd.weight", HUGE, 4),
    "a tensor of 2^31 axes": lambda data: replace_after(
        data, b"token_embd.weight", struct.pack("<I", 2**31)
    ),
    "a tensor of type 999": lambda data: replace_after(
        data, b"token_embd.weight", struct.pack("<I", 999), 20
    ),
    "a tensor beyond the end": lambda data: replace_after(data, b"token_embd.weight", HUGE, 24),
    "a tensor without rows": lambda data: replace_after(data, b"token_embd.weight", bytes(8), 4),
    "a name that is no text": lambda data: replace_after(data, b"token_em", b"\xff"),
}


def test_the_undamaged_file_converts(tmp_path, whole):
    (tmp_path / "m.gguf").write_bytes(whole)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("damage", DIRECTED.values(), ids=DIRECTED.keys())
def test_a_damaged_gguf_file_is_named_and_leaves_nothing_behind(tmp_path, whole, damage):
    (tmp_path / "m.gguf").write_bytes(damage(whole))
    with pytest.raises(ModelError, match=r"m\.gguf"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["m.gguf"]


Mutation = tuple[float, bytes, bool]  # where, the new bytes, and whether they replace others


@settings(
    max_examples=40,
    deadline=10_000,  # milliseconds
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1),
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([HUGE, b"\xff", b"\0"])),
            st.sampled_from([True, True, True, False]),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_gguf_file_with_other_bytes_converts_or_is_an_optimer_error(
    tmp_path, whole, mutations: list[Mutation]
):
    header = whole.index(b"blk.1.ffn_down") + 64  # what comes later are numbers of weights
    data = bytearray(whole)
    for place, new, makes_room in mutations:
        at = int(place * header)
        data[at : at + len(new) * makes_room] = new
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "m.gguf").write_bytes(data)
    try:
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    except OptimerError as error:
        assert "m.gguf" in str(error)
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
