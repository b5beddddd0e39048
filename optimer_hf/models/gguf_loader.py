"""Let transformers decode a GGUF file: its config, its weights and its tokenizer.

transformers skips keys and tensors that it does not know, so this module also says which it reads.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ModelError, OptimerError
from optimer_hf.files.text import first_line
from optimer_hf.models.gguf_header import GgufHeader
from optimer_hf.models.loader import refuse_missing_weights


@contextmanager
def naming_unreadable_gguf(file: Path) -> Iterator[None]:
    """Turn any error of a library that reads a GGUF file into a ModelError."""
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
    """Return the config that transformers makes from the metadata of a GGUF file."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
    )


def known_gguf_keys(header: GgufHeader) -> set[str]:
    """Return the metadata keys that transformers reads, without the architecture's prefix."""
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
    """A dictionary that records which keys are read."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def read_gguf_rows(header: GgufHeader, name: str, n_rows: int) -> Any:
    """Return the first rows of a tensor in a GGUF file, as a float32 array."""
    from gguf import GGUFReader, dequantize

    tensor = next(each for each in GGUFReader(header.path).tensors if each.name == name)
    return dequantize(tensor.data[:n_rows], tensor.tensor_type)


def decode_weights(file: Path, config: Any, dtype: torch.dtype) -> Any:
    """Return the model in a GGUF file with the given config, de-quantised to `dtype`.

    Raises ModelError if tensors that the config requires are missing.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    model, info = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    refuse_missing_weights(file, info)
    return model


def read_gguf_tokenizer(file: Path) -> Any:
    """Load the tokenizer in a GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
    )


def gguf_model_without_weights(config: Any) -> Any:
    """Build the model for a GGUF file's config on the device `meta`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def known_gguf_tensors(model: Any, header: GgufHeader) -> set[str]:
    """Return the tensors in a GGUF file that transformers loads; it skips all others."""
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
    """Whether a tensor stacks all experts of a layer; that parameter's name has no suffix."""
    return name.endswith("_exps.weight") and name.removesuffix(".weight") in known
