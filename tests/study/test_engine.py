"""engine.py: the engine of a study, as fields, and what is wrong with them."""

import pytest

from optimer_hf.errors import ConfigError, StudyError
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.engine import TRANSFORMERS, engine_of
from tests.support.landscapes import FunctionPool, config_of, no_pool_for

TWO_GPUS = {"name": "vllm", "tensor_parallel_size": 2, "hf_overrides": {"rope_theta": 1e6}}


@pytest.mark.parametrize("given", ["vllm", {"name": "vllm"}, TWO_GPUS])
def test_an_engine_is_part_of_a_study_with_all_its_options(given, tmp_path):
    config = config_of(engine=given)
    expected = {"name": given} if isinstance(given, str) else given
    assert config.identity["engine"] == expected
    assert config.engine.options == {key: expected[key] for key in expected if key != "name"}
    config.write(tmp_path / "study.json")
    assert StudyConfig.read(tmp_path / "study.json") == config


def test_a_study_without_an_engine_is_the_study_it_was_before_there_were_engines():
    assert config_of().engine == TRANSFORMERS
    assert "engine" not in config_of().identity
    assert config_of(engine="transformers").digest() == config_of().digest()
    assert config_of(engine="vllm").digest() != config_of().digest()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sglang", "engine.name: found 'sglang'. Input should be 'transformers' or 'vllm'"),
        ({"nam": "vllm"}, "engine.nam: found 'vllm', but the engine transformers has no options"),
        ({"name": "vllm", "dtype": "float16"}, "engine.dtype: found 'float16', but give dtype in"),
        ({"name": "vllm", "model": "a/b"}, "engine.model: found 'a/b', but it is the base_model"),
        ({"name": "vllm", "trust_remote_code": True}, "engine.trust_remote_code: found True"),
        ({"name": "vllm", "seed": float("nan")}, "engine.seed: found nan"),
        ("{name: vllm", "engine"),
        (3, "engine: found 3"),
    ],
)
def test_what_is_no_engine_is_refused_with_its_field(given, message):
    with pytest.raises(ConfigError) as error:
        engine_of(given)
    assert message in str(error.value)


def test_an_engine_is_given_by_name_by_fields_or_as_yaml():
    assert engine_of("vllm") == engine_of({"name": "vllm"}) == engine_of(engine_of("vllm"))
    assert engine_of("{name: vllm, max_model_len: 64}").options == {"max_model_len": 64}


@pytest.mark.parametrize("other", ["vllm", {"name": "vllm", "max_model_len": 64}])
def test_scores_of_two_engines_are_never_compared(other, tmp_path):
    search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))
    with pytest.raises(StudyError, match=r"engine.*Scores of two engines are never compared"):
        search(config_of(engine=other), tmp_path / "s", runner=InProcess(no_pool_for("another")))


def test_a_device_map_is_for_transformers():
    with pytest.raises(ValueError, match=r"device_map.*give its options tensor_parallel_size"):
        config_of(engine="vllm", device_map="auto")
