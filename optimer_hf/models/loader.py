"""The only place that lets transformers and PEFT read somebody's model: a directory comes in; a
model, a config, a tokenizer or an adapter goes out, and none of its code has run.

`trust_remote_code` is False in every call: unset, transformers asks on the terminal, and a script
that answers "y" runs whatever came with the model. What a reader would not guess: besides
`auto_map`, a config can name code as a kernel repository or as PEFT's Megatron module; one large
number in it keeps transformers busy for hours; and a weight that is missing is drawn at random.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ModelError, OptimerError
from optimer_hf.files.text import first_line, quote
from optimer_hf.models.gguf_header import GgufHeader
from optimer_hf.models.layout import GENERATION_CONFIG

CONFIG = "config.json"
READ = {  # by a library; others of such names may hold anything
    *("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
}
NO_MEMORY = re.compile(r"DefaultCPUAllocator|out of memory|annot allocate memory", re.IGNORECASE)
CONFIGS = "*config*.json"  # of the model (also config.5.0.0.json), tokenizer, processor, adapter
PARTS = re.compile(r"layers?$|blocks?$|heads?$|experts?$|labels$|depth$|stages?$|codebooks?$")
SIZES = re.compile(r"size|dim|embd|vocab|d_model|d_ff|width|rank|positions|embeddings|n_inner|ctx")
MOST_PARTS, LARGEST_SIZE = 10_000, 2**25  # layers, heads; columns, rows of a vocabulary, positions
LARGEST_CONFIG = 64 * 2**20  # bytes; a tokenizer_config.json of 100,000 added tokens has 20 MB
KERNELS = ("attn_implementation", "experts_implementation")


# -- what is refused before anything is loaded -----------------------------------------------------


def refuse_code(path: Path) -> None:
    """Raise ModelError for a directory whose configs name Python code of the model's own, or cannot
    be read.

    The code is refused also where transformers has the architecture itself: the two may differ, and
    a merge would point to code that it lacks.
    """
    for file in sorted(path.glob(CONFIGS)):
        if not file.is_file() or _is_list(file):
            continue
        config = read_settings(file)
        if config.get("auto_map"):
            raise ModelError(
                f"{file}: `auto_map` names code of the model ({quote(config['auto_map'])}), which "
                "is never run. Where transformers has the architecture itself, take `auto_map` out "
                "of a copy of the directory."
            )
        if config.get("transformers_weights"):
            raise ModelError(
                f"{file}: `transformers_weights` names another weights file "
                f"({quote(config['transformers_weights'])}) than those that are merged. Take it "
                "out of a copy of the directory."
            )
        kernels = [str(config.get(key) or config.get(f"_{key}") or "") for key in KERNELS]
        found = next((text for text in kernels if "/" in text), None)
        if found is not None or config.get("megatron_config"):
            named = found or config.get("megatron_core")
            raise ModelError(
                f"{file}: names code to load ({quote(named)}), which is never run. Take it out of "
                "a copy of the directory."
            )


def _is_list(file: Path) -> bool:
    """Return whether a file is of no library: a list in a name that none of them reads."""
    with open(file, "rb") as opened:
        return file.name not in READ and opened.read(64).lstrip()[:1] == b"["


def read_settings(file: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file of a model holds, as transformers reads it: of a key that
    is given twice the last. Raises ModelError for anything else.
    """
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it is larger than {LARGEST_CONFIG:,} bytes")
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error) if not isinstance(error, RecursionError) else "nested too deeply"
        raise ModelError(
            f"{file}: cannot be read as JSON ({reason}). Fetch the model again."
        ) from None
    if not isinstance(settings, dict):
        raise ModelError(
            f"{file}: found {quote(settings)}, expected a mapping. Fetch the model again."
        )
    return settings


def refuse_absurd(path: Path) -> None:
    """Raise ModelError for a config.json with a number of layers, heads or labels, or a size, that
    no model has: transformers would make them all before it compares them with the weights.
    """
    file = path / CONFIG
    for key, number in _numbers_in(read_settings(file)):
        limit = MOST_PARTS if PARTS.search(key) else LARGEST_SIZE if SIZES.search(key) else None
        if limit is not None and not 0 <= abs(number) <= limit:
            raise ModelError(
                f"{file}: {key}: found {quote(number)}, expected at most {limit:,}. Fetch the "
                "model again."
            )


def _numbers_in(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers_in(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def refuse_lack_of_memory(error: BaseException, where: object) -> None:
    """Raise ModelError where the memory of a CPU has run out, which torch says by a RuntimeError;
    what was read is not at fault.
    """
    if isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)):
        raise ModelError(
            f"{where}: does not fit into the memory that is free ({first_line(error)}). Free some, "
            "or take a larger machine."
        ) from error


@contextmanager
def naming_unloadable(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a model into a ModelError that names it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, OptimerError):
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # dozens of types; a panic of tokenizers is no Exception
        refuse_lack_of_memory(error, path)
        raise ModelError(
            f"{path}: transformers cannot load the {what} ({first_line(error)}). Fetch it again, "
            "or save it with `save_pretrained`."
        ) from error


# -- reading ---------------------------------------------------------------------------------------


def read_config(path: Path) -> Any:
    """Return transformers' config of a model directory."""
    from transformers import AutoConfig

    refuse_code(path)
    refuse_absurd(path)
    with naming_unloadable(path, "model"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def read_model(path: Path, **options: Any) -> Any:
    """Return the language model of a directory; `options` are those of `from_pretrained`.

    Raises ModelError, also for a weight that its config asks for and the files lack: transformers
    would draw it at random.
    """
    config = read_config(path)
    model, found = _loaded(_class_of_text(config), path, config, **options)
    _refuse_missing(path, found)
    return model


def _class_of_text(config: Any) -> Any:
    """Return the auto class that generates text for a config: transformers lists some models with
    images (Qwen2-VL, Mistral 3, SmolVLM) under no causal one; without an image they are.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_listed = type(config) in AutoModelForCausalLM._model_mapping
    has_images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if has_images and not is_listed else AutoModelForCausalLM


def _loaded(model_class: Any, path: Path, config: Any, **options: Any) -> tuple[Any, Any]:
    """Return a model of a class, and what transformers says of the tensors of its files."""
    with naming_unloadable(path, "model"):
        model, found = model_class.from_pretrained(
            path,
            config=config,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    return model, found


def _refuse_missing(path: Path, found: dict[str, Any]) -> None:
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"{path}: lacks the tensor {missing[0]!r}, which its config asks for "
            f"({len(missing)} in all). Fetch the weights again, or mend the config."
        )


def model_without_weights(path: Path) -> Any:
    """Return the language model of a directory on the device `meta`."""
    config = read_config(path)
    with naming_unloadable(path, "model"), torch.device("meta"):
        return _class_of_text(config).from_config(config, trust_remote_code=False)


@dataclass(frozen=True)
class Loading:
    """How the files of a model fit its config: tensors that they lack, that nothing reads, and of
    another shape.
    """

    missing: frozenset[str]
    unread: frozenset[str]
    misshapen: frozenset[str]


def loading_of(path: Path) -> Loading:
    """Return how transformers would load a model directory, of any class; reads no weights."""
    import transformers

    config = read_config(path)
    named = getattr(transformers, (config.architectures or [""])[0], None)  # may be TRL's
    model_class = named or transformers.AutoModelForCausalLM
    _, found = _loaded(model_class, path, config, device_map="meta", ignore_mismatched_sizes=True)
    shapes = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    return Loading(
        frozenset(found["missing_keys"]), frozenset(found["unexpected_keys"]), frozenset(shapes)
    )


def whole_model_without_weights(path: Path) -> Any:
    """Return the model of a directory on the device `meta` as its config describes it: with images,
    where it has them, although only its language part is trained and evaluated.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = read_config(path)
    with naming_unloadable(path, "model"), torch.device("meta"):
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
            if type(config) in auto._model_mapping:
                return auto.from_config(config, trust_remote_code=False)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        known = [cls for cls in named if cls is not None and hasattr(cls, "_from_config")]
        if not known:
            raise ValueError(f"it has no class for {config.model_type}")
        return known[0]._from_config(config)


def text_model_without_weights(path: Path) -> Any | None:
    """Return the language part of a multimodal model on the device `meta`; None for others."""
    from transformers import AutoModelForCausalLM

    whole = read_config(path)
    config = whole.get_text_config()
    if config is whole or type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    with naming_unloadable(path, "model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def read_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a model directory; ModelError says why it cannot be loaded."""
    from transformers import AutoTokenizer

    refuse_code(path)
    with naming_unloadable(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def read_generation_config(path: Path) -> Any | None:
    """Return transformers' generation config of a model directory, None where it has none."""
    from transformers import GenerationConfig

    file = path / GENERATION_CONFIG
    if not file.exists():
        return None
    settings = read_settings(file)
    with naming_unloadable(file, "generation config"):
        return GenerationConfig.from_dict(settings)


# -- GGUF ------------------------------------------------------------------------------------------


@contextmanager
def naming_unreadable_gguf(file: Path) -> Iterator[None]:
    """Turn whatever a library raises while it reads a GGUF file into a ModelError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, OptimerError):
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ImportError as error:
        raise ModelError(f"{file}: reading GGUF needs a package: {error}") from error
    except BaseException as error:
        raise ModelError(
            f"{file}: transformers cannot read this GGUF file ({first_line(error)}). Fetch it "
            "again, or convert the original weights."
        ) from error


def read_gguf_config(file: Path) -> Any:
    """Return transformers' own reading of the metadata of a GGUF file."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
    )


def gguf_keys_read(header: GgufHeader) -> set[str]:
    """Return the keys of the architecture, without its prefix, that transformers itself reads."""
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    name = header.architecture
    if name in GGUF_CONFIG_ARCHS:
        metadata = _Recording(header.metadata)
        GGUF_CONFIG_ARCHS[name](metadata, tuple(header.tensors))
        return {key.removeprefix(f"{name}.") for key in metadata.read}
    for known in (name, name.replace("-", "_"), name.replace("moe", "_moe")):
        if known in GGUF_CONFIG_MAPPING:
            return {key for key, value in GGUF_CONFIG_MAPPING[known].items() if value is not None}
    raise ValueError(f"GGUF model with architecture {name} is not supported yet")


class _Recording(dict[str, Any]):
    """A dictionary that knows which of its keys were looked at."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def gguf_numbers(header: GgufHeader, name: str, n_rows: int) -> Any:
    """Return the first rows of a tensor of a GGUF file, as a float32 array."""
    from gguf import GGUFReader, dequantize

    tensor = next(each for each in GGUFReader(header.path).tensors if each.name == name)
    return dequantize(tensor.data[:n_rows], tensor.tensor_type)


def read_gguf(file: Path, config: Any, dtype: torch.dtype) -> Any:
    """Return the model of a GGUF file, de-quantised to `dtype`.

    Raises ModelError for tensors that the config asks for and the file lacks.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    model, found = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    _refuse_missing(file, found)
    return model


def read_gguf_tokenizer(file: Path) -> Any:
    """Return the tokenizer of a GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
    )


def gguf_model_without_weights(config: Any) -> Any:
    """Return the model of a config that was read from a GGUF file, on the device `meta`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def gguf_names_read(model: Any, header: GgufHeader) -> set[str]:
    """Return the tensors of a GGUF file that transformers reads into a model: others it skips."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if header.architecture in GGUF_CONFIG_ARCHS:
        return set(header.tensors)  # loading refuses what no rule renames
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    known = get_gguf_hf_weights_map(model, processor(config={}))
    return {name for name in header.tensors if name in known or _is_stack_of(known, name)}


def _is_stack_of(known: Mapping[str, str], name: str) -> bool:
    """Whether a tensor holds all experts of a layer, whose parameter has no suffix."""
    return name.endswith("_exps.weight") and name.removesuffix(".weight") in known


# -- adapters --------------------------------------------------------------------------------------


def read_adapter_config(path: Path) -> Any:
    """Return PEFT's config of an adapter directory; raises whatever PEFT raises."""
    from peft import PeftConfig

    refuse_code(path)
    return PeftConfig.from_pretrained(str(path))


def model_with_adapter(model: Any, path: Path) -> Any:
    """Return a model with an adapter on it; raises whatever PEFT raises."""
    from peft import PeftModel

    refuse_code(path)
    return PeftModel.from_pretrained(model, str(path))
