"""Models that several tests of this room read."""

from pathlib import Path

import pytest

from tests.support.gguf import write_llama
from tests.support.publishing import name  # noqa: F401 - a fixture
from tests.support.tiny import tiny_model


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory, tokenizer) -> Path:
    return write_llama(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model("llama"), tokenizer
    )
