"""Damaged vectors: opened, or refused by name."""

import json
import shutil
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimer_hf.errors import OptimerError
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.damage import TEXTS, damage


@pytest.fixture(scope="module")
def delta(tmp_path_factory, make_base, make_tuned):
    """A base, and a quantised delta of two shards beside it."""
    base = make_base("llama")
    folder = tmp_path_factory.mktemp("delta")
    source = open_vector("v", str(make_tuned(base, "llama", 1)), base)
    extract(source, base, folder / "v", dtype="int8", max_shard_size=20_000)
    return base, folder / "v"


@given(data=st.data())
@settings(
    max_examples=80, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_vector_is_opened_or_refused_by_an_error_of_ours(tmp_path_factory, delta, data):
    base, source = delta
    copy = tmp_path_factory.mktemp("damaged") / "v"
    shutil.copytree(source, copy)
    files = ["vector.json", "config.json", "vector.safetensors.index.json"]
    file = copy / data.draw(st.sampled_from([f for f in files if (copy / f).exists()]))
    if data.draw(st.booleans()):
        changed = damage(data.draw, json.loads(file.read_text()))
        text = json.dumps(changed) if not isinstance(changed, str) else changed
    else:
        whole = file.read_text()
        cut = data.draw(st.integers(0, len(whole)))
        text = whole[:cut] + data.draw(st.sampled_from([*TEXTS, ""]))
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    tracemalloc.start()
    try:
        vector = open_vector("v", str(copy), base)
        for name in sorted(vector.names)[:3]:
            assert isinstance(vector.delta(name, slice(0, 1), "cpu"), torch.Tensor)
    except OptimerError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**28
