"""The `generation` of a term + that of its task -> lm-eval's generation_kwargs, which are tried out
before anything is scored.

Transformers itself judges the settings: a tiny model generates two tokens with them, through
lm-eval's own code. Whatever would end a trial in a traceback ends here with the name of the term.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from optimer_hf.errors import EvaluationError
from optimer_hf.files.text import did_you_mean, first_line, quote
from optimer_hf.printable import warn_once
from optimer_hf.scoring.harness import quiet_lm_eval
from optimer_hf.scoring.objective import LENGTHS, Term

logger = logging.getLogger(__name__)


GENERATION_CAP = 256  # tokens, if a task sets no length: it might never stop
ALIASES = ("max_gen_toks", "max_new_tokens", *LENGTHS[1:])  # lm-eval takes the first one given
NOT_OURS = {  # fields of GenerationConfig that a term cannot set, and what to do instead
    "use_cache": "lm-eval sets it itself. Leave it out.",
    "pad_token_id": "lm-eval takes that of the tokenizer. Leave it out.",
    "max_length": "it counts the prompt, too. Give max_gen_toks, which counts what is generated.",
    "max_time": "the scores would depend on the speed of the machine. Give max_gen_toks.",
    "stop_strings": "lm-eval stops at the texts of `until`. Give them there.",
}
N_TRIED = 2  # prompts; settings that do not work with a batch need more than one
MOST_TRIED_BEAMS = 8


def generation_settings(term: Term, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation_kwargs of a term: its `generation` over the `own` ones of its task.

    Raises EvaluationError, which names term and field, for settings that lm-eval or transformers
    would refuse or misunderstand.
    """
    _refuse_unusable(term)
    settings = _assemble_settings(term, own)
    reason = _why_not_taken(settings)
    if reason is None:
        _warn_of_idle(term, settings)
        return settings
    if field := _field_at_fault(term, own, reason):
        where = f"generation.{field}: found {quote(term.generation[field])}"
        raise EvaluationError(f"term {term.label!r}: {where}, which cannot be used: {reason}")
    whose = "generation" if term.generation else f"generation_kwargs of task {term.task_name!r}"
    raise EvaluationError(f"term {term.label!r}: {whose}: cannot be used: {reason}")


def refuse_too_long(term: Term, settings: Mapping[str, Any], window: int) -> None:
    """Raise EvaluationError if the generation_kwargs of a term allow as many new tokens as the
    model's window holds. The prompt has to fit in, too, or lm-eval gives up.
    """
    name = next(name for name in ALIASES if settings.get(name) is not None)
    n_new = int(settings[name])
    if n_new < window:
        return
    if name in term.generation:
        where = f"generation.{name}: found {n_new:,}"
    else:
        where = f"task {term.task_name!r} generates up to {n_new:,} tokens"
    raise EvaluationError(
        f"term {term.label!r}: {where}, but the model's window holds {window:,} tokens, prompt "
        f"included. Give the term generation: {{max_gen_toks: N}} with N far below {window:,}."
    )


def _field_at_fault(term: Term, own: Mapping[str, Any], reason: str) -> str | None:
    """Return the field of a term that a refusal names, or without which nothing is refused."""
    for field in term.generation:
        if f"`{field}`" in reason:
            return field
    for field in term.generation:
        others = {key: value for key, value in term.generation.items() if key != field}
        rest = _assemble_settings(term.model_copy(update={"generation": others}), own)
        if _why_not_taken(rest) is None:
            return field
    return None


def _refuse_unusable(term: Term) -> None:
    """Raise EvaluationError for fields that nothing reads, or that would be misunderstood."""
    from transformers import GenerationConfig

    known = ["until", *LENGTHS, *(key for key in vars(GenerationConfig()) if key[0] != "_")]
    for key in term.generation:
        if key not in known:
            raise EvaluationError(
                f"term {term.label!r}: generation: unknown field {key!r}.{did_you_mean(key, known)}"
            )
        if key in NOT_OURS:
            raise EvaluationError(f"term {term.label!r}: generation.{key}: {NOT_OURS[key]}")
    if len(given := [name for name in ALIASES if name in term.generation]) > 1:
        raise EvaluationError(
            f"term {term.label!r}: generation: {' and '.join(given)} are names of one number. Give "
            "only one of them."
        )
    until = term.generation.get("until", [])
    texts = until if isinstance(until, list) else [until]
    if not all(isinstance(text, str) and text for text in texts):
        raise EvaluationError(
            f"term {term.label!r}: generation.until: found {quote(until)}. Expected a text, or a "
            "list of texts, none of them empty."
        )


def _assemble_settings(term: Term, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a term over those of its task, with one of ALIASES."""
    settings = {"max_gen_toks": GENERATION_CAP} | dict(own) | term.generation
    for source in (term.generation, own):
        if given := [name for name in ALIASES if source.get(name) is not None]:
            for name in ALIASES:
                if name != given[0]:
                    settings.pop(name, None)
            break
    return settings


def _why_not_taken(settings: Mapping[str, Any]) -> str | None:
    """Return why lm-eval and transformers cannot generate with settings; None if they can."""
    temperature = settings.get("temperature")
    if settings.get("do_sample") is True and not temperature:
        return "`do_sample` needs a temperature above 0. Add one, or leave do_sample out."
    try:
        with _quiet_libraries():
            _generate(settings)
    except Exception as error:  # of any type, from deep inside the libraries
        reason = first_line(error).rstrip(".")
        return f"{reason}. Change or drop it."
    return None


def _warn_of_idle(term: Term, settings: Mapping[str, Any]) -> None:
    """Log what transformers says about fields that it ignores, given the other fields."""
    from transformers import GenerationConfig

    fields = {key: value for key, value in settings.items() if key not in ("until", *ALIASES)}
    temperature = float(fields.get("temperature") or 0.0)
    fields.setdefault("do_sample", temperature > 0)
    if not temperature:
        fields.pop("temperature", None)
    try:
        with _quiet_libraries():
            GenerationConfig(**fields).validate(
                strict=True, user_set_attributes=set(term.generation)
            )
    except ValueError as error:
        for line in str(error).splitlines():
            if line.startswith("- "):
                warn_once(logger, f"term {term.label!r}: generation: {line[2:]}")


def _generate(settings: Mapping[str, Any]) -> None:
    """Generate with a tiny model, as `HFLM.generate_until` does."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), GENERATION_CAP))
    handle_stop_sequences(options.pop("until"), eos=None)
    n_new = min(options.pop("max_gen_toks"), N_TRIED)
    if isinstance(options.get("num_beams"), int):
        options["num_beams"] = min(options["num_beams"], MOST_TRIED_BEAMS)
    config = LlamaConfig(
        vocab_size=64
        + max(_integers_in(settings), default=0),  # so that every token that is named exists
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config).eval()
    prompts = torch.ones((N_TRIED, 4), dtype=torch.long)
    harness: Any = SimpleNamespace(
        model=model,
        device=model.device,
        tokenizer=SimpleNamespace(pad_token_id=0),
        mixed_precision_dtype=None,
    )
    generated = HFLM._model_generate(
        harness,
        context=prompts,
        attention_mask=torch.ones_like(prompts),
        stop=[],
        max_length=prompts.shape[1] + n_new,
        **options,
    )
    if not isinstance(generated, torch.Tensor) or len(generated) != N_TRIED:
        raise ValueError("it does not return one text for each prompt")


def _integers_in(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _integers_in(item)
    elif isinstance(value, int):
        yield value


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep the state of torch's random numbers, and keep the libraries quiet."""
    import torch
    from transformers.utils import logging as of_transformers

    level = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        with quiet_lm_eval(), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        of_transformers.set_verbosity(level)
