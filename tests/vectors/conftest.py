"""A base, a fine-tune and an adapter of it."""

from pathlib import Path

import pytest

from optimer_hf.models.layout import ResolvedModel


@pytest.fixture(scope="module")
def base(make_base) -> ResolvedModel:
    return make_base("llama")


@pytest.fixture(scope="module")
def tuned(base, make_tuned) -> Path:
    return make_tuned(base, "llama", 1)


@pytest.fixture(scope="module")
def adapter(base, make_adapter) -> Path:
    return make_adapter(base, 1)
