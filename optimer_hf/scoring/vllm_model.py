"""A model directory + options of vLLM -> lm-eval's own vLLM model, which starts an engine of vLLM
and scores with it. Importing the module needs vLLM, and takes seconds.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from optimer_hf.errors import EvaluationError
from optimer_hf.scoring.harness import (
    Tokens,
    open_ended,
    quiet_lm_eval,
    refuse_empty_continuations,
    rolling_windows,
    warn_of_cut_prompts,
)
from optimer_hf.scoring.vllm_options import naming_vllm, sampling_settings
from optimer_hf.scoring.vllm_processes import call_engine, running_processes

with naming_vllm(), quiet_lm_eval():
    from lm_eval.models.vllm_causallms import VLLM

ALL_AT_ONCE = 2**31  # requests; vLLM makes its own batches


def make_vllm_model(path: Path, tokenizer: Any, options: Mapping[str, Any]) -> "HarnessModel":
    """Return lm-eval's vLLM model with a running engine, `model`, for the model in a directory.
    `options` are those of vLLM's `LLM`; `tokenizer` is the one to score with.
    """
    opened = open_ended(tokenizer)
    with naming_vllm(), quiet_lm_eval():
        return HarnessModel(path, opened, options)


class HarnessModel(Tokens, VLLM):
    """VLLM, but with one BOS before a document, no progress bars, and counts of time and
    tokens.
    """

    def __init__(self, path: Path, tokenizer: Any, options: Mapping[str, Any]) -> None:
        super().__init__(
            pretrained=str(path), trust_remote_code=False, batch_size=ALL_AT_ONCE, **options
        )
        self.tokenizer = tokenizer
        self.hf_chat_template = None  # that of the tokenizer
        self.processes = running_processes()
        self.forward_seconds, self.backward_seconds = 0.0, 0.0
        self.n_tokens = 0

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        refuse_empty_continuations(requests)
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
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
