"""The engine of a study: what holds the model of a trial and scores it, and with which options.

An engine is chosen once for a study. Two engines round differently, so their scores are never
compared.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from optimer_hf.files.model import FileModel, Mistake, parse
from optimer_hf.files.reading import parse_yaml
from optimer_hf.files.text import quote
from optimer_hf.scoring.objective import mistakes_of_json

OWN_OPTIONS = {  # of vLLM that follow from the rest of the study, and what to do instead
    "model": "it is the base_model of the study. Leave it out",
    "tokenizer": "give tokenizer_source in the study instead",
    "dtype": "give dtype in the study instead",
    "generation_config": "it comes with the tokenizer; give tokenizer_source in the study",
    "trust_remote_code": "code in a model is never run. Leave it out",
    "worker_extension_cls": "the vectors are held there. Leave it out",
    "data_parallel_size": "one engine scores one trial at a time; give tensor_parallel_size",
    **dict.fromkeys(
        ("revision", "tokenizer_revision", "code_revision"),
        "give it with the model, as base_model: org/name@revision",
    ),
    **dict.fromkeys(
        ("enable_lora", "runner", "convert", "skip_tokenizer_init"),
        "a trial is a merged model that generates text. Leave it out",
    ),
}


class EngineConfig(FileModel):
    """What holds and scores the merges of a study. A plain text is short for its name:
    `engine: vllm`. Further fields are options of vLLM, by the names of its `LLM` class:
    `engine: {name: vllm, tensor_parallel_size: 2, max_model_len: 4096}`.
    """

    model_config = ConfigDict(extra="allow")

    name: Literal["transformers", "vllm"] = Field(default="transformers", examples=["vllm"])
    """transformers: the model is in this process. vllm: vLLM runs it in processes of its own, for
    tasks that generate text and models that need several GPUs; install the extra vllm.
    """

    @property
    def options(self) -> dict[str, Any]:
        """The options of the engine, by name."""
        return dict(self.model_extra or {})

    def mistakes(self) -> Iterator[Mistake]:
        for name, value in self.options.items():
            if self.name == "transformers":
                message = f"found {quote(value)}, but the engine transformers has no options"
                yield (name,), f"{message}. Give name: vllm, or leave it out"
            elif name in OWN_OPTIONS:
                yield (name,), f"found {quote(value)}, but {OWN_OPTIONS[name]}"
        for at, message in mistakes_of_json(self.options):
            yield at, message


TRANSFORMERS = EngineConfig()


def engine_of(given: EngineConfig | Mapping[str, Any] | str) -> EngineConfig:
    """Return the engine that a caller names: by its name, by its fields, or by these as YAML.

    Raises ConfigError for anything else.
    """
    if isinstance(given, EngineConfig):
        return given
    if isinstance(given, str):
        given = parse_yaml(given, "engine")
    return parse(_Engine, {"engine": given}, Path("engine")).engine


def _expand_name(value: Any) -> Any:
    """Return the fields of an engine; a text alone is its name."""
    return {"name": value} if isinstance(value, str) else value


# a text stands for {"name": text}
EngineEntry = Annotated[
    EngineConfig,
    BeforeValidator(
        _expand_name, json_schema_input_type=Literal["transformers", "vllm"] | EngineConfig
    ),
]


class _Engine(FileModel):
    engine: EngineEntry
