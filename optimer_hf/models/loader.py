"""Load models, configs, tokenizers and adapters without running their code.

Only this module and `gguf_loader` let transformers or PEFT read an untrusted model.
`trust_remote_code` is False in every call: if unset, transformers asks on the terminal, and a
script that answers "y" runs whatever came with the model. A config can also name code in other ways
than `auto_map`: as a kernel repository, or as PEFT's Megatron module. One large number in it keeps
transformers busy for hours, and transformers fills missing weights with random numbers. All of
these are refused here.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError, OptimerError
from optimer_hf.files.text import first_line, quote
from optimer_hf.models.layout import GENERATION_CONFIG, role_of

CONFIG = "config.json"
NUMBERS_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
CONFIGS = "*config*.json"  # for model (also config.5.0.0.json), tokenizer, processor, adapter
PARTS = re.compile(r"layers?$|blocks?$|heads?$|experts?$|labels$|depth$|stages?$|codebooks?$")
SIZES = re.compile(r"size|dim|embd|vocab|d_model|d_ff|width|rank|positions|embeddings|n_inner|ctx")
MOST_PARTS, LARGEST_SIZE = 10_000, 2**25  # layers, heads; columns, rows of a vocabulary, positions
LARGEST_CONFIG = 64 * 2**20  # bytes; a tokenizer_config.json with 100,000 added tokens has 20 MB
KERNELS = ("attn_implementation", "experts_implementation")


# -- refuse before loading -------------------------------------------------------------------------


def refuse_code(path: Path) -> None:
    """Raise ModelError if a model's configs name Python code to run, or cannot be read.

    The code is refused even if transformers has the architecture itself: the two may differ, and a
    merge would refer to code that it lacks.
    """
    for file in sorted(path.glob(CONFIGS)):
        if not file.is_file() or _is_list(file):
            continue
        config = read_settings(file)
        if config.get("auto_map"):
            raise ModelError(
                f"{file}: `auto_map` names code in the model ({quote(config['auto_map'])}), which "
                "is never run. If transformers has the architecture itself, remove `auto_map` "
                "from a copy of the directory."
            )
        if config.get("transformers_weights"):
            raise ModelError(
                f"{file}: `transformers_weights` names a weights file "
                f"({quote(config['transformers_weights'])}) other than those that are merged. "
                "Remove it from a copy of the directory."
            )
        kernels = [str(config.get(key) or config.get(f"_{key}") or "") for key in KERNELS]
        kernel = next((text for text in kernels if "/" in text), None)
        if kernel is not None or config.get("megatron_config"):
            named = kernel or config.get("megatron_core")
            raise ModelError(
                f"{file}: names code to load ({quote(named)}), which is never run. Remove it from "
                "a copy of the directory."
            )


def _is_list(file: Path) -> bool:
    """Whether a file contains a list, unless a library reads files of this name."""
    if role_of(file.name) != "data":
        return False
    with open(file, "rb") as opened:
        return opened.read(64).lstrip()[:1] == b"["


def read_settings(file: Path) -> dict[str, Any]:
    """Return the mapping in a model's JSON file, as transformers reads it.

    The last of several equal keys counts. Raises ModelError for anything but a mapping.
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


def count_layers(model: Path) -> int:
    """Return the number of layers of the language model in a directory, from its config. Raises
    ModelError for a config that does not say it.
    """
    config = read_settings(model / CONFIG)
    text = config.get("text_config")
    for block in ([text] if isinstance(text, dict) else []) + [config]:
        numbers = [block[key] for key in NUMBERS_OF_LAYERS if isinstance(block.get(key), int)]
        if numbers and numbers[0] > 0:
            return int(numbers[0])
    raise ModelError(
        f"{model / CONFIG}: does not say how many layers the model has, so a vector of it cannot "
        "be split by layers. Split it by names."
    )


def refuse_absurd(path: Path) -> None:
    """Raise ModelError for absurd sizes or numbers of layers, heads or labels in config.json.

    transformers would create them all before comparing them with the weights.
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
    """Raise ModelError if the CPU is out of memory, which torch reports as a RuntimeError.

    The file that was being read is not at fault.
    """
    from optimer_hf.models.memory import lacks_memory

    if isinstance(error, RuntimeError) and lacks_memory(error):
        raise ModelError(
            f"{where}: does not fit into the free memory ({first_line(error)}). Free some memory, "
            "or use a larger machine."
        ) from error


@contextmanager
def naming_unloadable(path: Path, what: str) -> Iterator[None]:
    """Turn any error of a library that reads a model into a ModelError that names the model."""
    try:
        yield
    except (MemoryError, OptimerError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # dozens of types; a panic in tokenizers is not an Exception
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
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
    """Load the language model in a directory; `options` go to `from_pretrained`.

    Raises ModelError, also if a weight that the config requires is missing: transformers would fill
    it with random numbers.
    """
    config = read_config(path)
    _refuse_other_kinds(path, config)
    model, info = _load(_class_of_text(config), path, config, **options)
    refuse_missing_weights(path, info)
    return model


def _class_of_text(config: Any) -> Any:
    """Return the auto class that generates text for a config.

    transformers does not list some vision models (Qwen2-VL, Mistral 3, SmolVLM) as causal ones,
    which they are if there is no image.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_listed = type(config) in AutoModelForCausalLM._model_mapping
    has_images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if has_images and not is_listed else AutoModelForCausalLM


def _refuse_other_kinds(path: Path, config: Any) -> None:
    """Raise ModelError for a kind of model that does not continue a text, such as T5 or CLIP."""
    from transformers import AutoModelForSeq2SeqLM

    model_class = _class_of_text(config)
    if type(config) in model_class._model_mapping:
        return
    is_pair = type(config) in AutoModelForSeq2SeqLM._model_mapping
    kind = "reads its input with an encoder" if is_pair else "does not write text"
    raise ModelError(
        f"{path}: is a {config.model_type} model, which {kind}. Only models that continue a text "
        "can be trained, searched and scored; `optimer merge` merges what mergekit knows."
    )


def _load(model_class: Any, path: Path, config: Any, **options: Any) -> tuple[Any, Any]:
    """Load a model with a class; also return transformers' report on the tensors in the files."""
    with naming_unloadable(path, "model"):
        model, info = model_class.from_pretrained(
            path,
            config=config,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    return model, info


def refuse_missing_weights(path: Path, info: Mapping[str, Any]) -> None:
    """Raise ModelError if weights are missing, by transformers' report on loading a model."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{path}: lacks the tensor {missing[0]!r}, which its config requires "
            f"({len(missing)} in all). Fetch the weights again, or fix the config."
        )


def model_without_weights(path: Path) -> Any:
    """Build the language model in a directory on the device `meta`."""
    import torch

    config = read_config(path)
    _refuse_other_kinds(path, config)
    with naming_unloadable(path, "model"), torch.device("meta"):
        return _class_of_text(config).from_config(config, trust_remote_code=False)


@dataclass(frozen=True)
class Loading:
    """How a model's files fit its config: missing, unread and wrongly shaped tensors."""

    missing: frozenset[str]
    unread: frozenset[str]
    misshapen: frozenset[str]


def describe_loading(path: Path) -> Loading:
    """Return how transformers would load a model of any class, without reading its weights."""
    import transformers

    config = read_config(path)
    named = getattr(transformers, (config.architectures or [""])[0], None)  # may be a TRL class
    model_class = named or transformers.AutoModelForCausalLM
    _, info = _load(model_class, path, config, device_map="meta", ignore_mismatched_sizes=True)
    shapes = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    return Loading(
        frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), frozenset(shapes)
    )


def whole_model_without_weights(path: Path) -> Any:
    """Build the whole model in a directory on the device `meta`.

    That includes the vision part of a multimodal model, although only the language part is trained
    and evaluated.
    """
    import torch
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
    """Build the language part of a multimodal model on the device `meta`; None for other models."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = read_config(path)
    config = whole.get_text_config()
    if config is whole or type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    with naming_unloadable(path, "model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def read_tokenizer(path: Path) -> Any:
    """Load the tokenizer in a model directory; raises ModelError with the reason."""
    from transformers import AutoTokenizer

    refuse_code(path)
    with naming_unloadable(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def read_generation_config(path: Path) -> Any | None:
    """Load the generation config in a model directory; None if there is none."""
    from transformers import GenerationConfig

    file = path / GENERATION_CONFIG
    if not file.exists():
        return None
    settings = read_settings(file)
    with naming_unloadable(file, "generation config"):
        return GenerationConfig.from_dict(settings)


# -- adapters --------------------------------------------------------------------------------------


def read_adapter_config(path: Path) -> Any:
    """Load the PEFT config in an adapter directory; raises whatever PEFT raises."""
    from peft import PeftConfig

    refuse_code(path)
    return PeftConfig.from_pretrained(str(path))


def model_with_adapter(model: Any, path: Path) -> Any:
    """Put an adapter on a model; raises whatever PEFT raises."""
    from peft import PeftModel

    refuse_code(path)
    return PeftModel.from_pretrained(model, str(path))
