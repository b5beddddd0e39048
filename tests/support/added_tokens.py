"""Vectors whose tokenizers have tokens that the base lacks, or have them in other places."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from optimer_hf.models.layout import ResolvedModel

START, END, TOOL = "<|im_start|>", "<|im_end|>", "<|tool|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
TEXT = f"aab xy{START}user ab{END}{TOOL}zz"


def with_tokens(base: Path, tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a base with added tokens, in this order, and a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turned_round(base: Path, tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the tokens of a base in the opposite order, after the added ones."""
    known = AutoTokenizer.from_pretrained(base).get_vocab()
    order = [*tokens, *sorted(known, key=known.__getitem__, reverse=True)]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(order)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    first = ("<bos>", order.index("<bos>"))
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[first])
    raw.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def save_tuned(
    base: ResolvedModel,
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    n_rows: int | None = None,
) -> Path:
    """Write a fine-tune with a tokenizer: the rows of the base in its order, and random new ones,
    all with noise. `n_rows` are the rows of embedding and head (default: one for each token).
    """
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    known = AutoTokenizer.from_pretrained(base.path).get_vocab()
    ids = tokenizer.get_vocab()
    torch.manual_seed(300 + seed)
    ends = [model.get_input_embeddings().weight.detach().clone()]
    is_tied = model.config.get_text_config().tie_word_embeddings
    ends += [] if is_tied else [model.get_output_embeddings().weight.detach().clone()]
    model.resize_token_embeddings(n_rows or len(ids), mean_resizing=False)
    with torch.no_grad():
        targets = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        for target, old in zip(targets, ends, strict=False):
            target.normal_(std=0.02)
            for token, number in ids.items():
                if known.get(token, len(old)) < len(old):
                    target[number] = old[known[token]]
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def logits_by_token(directory: Path, text: str = TEXT) -> dict[str, torch.Tensor]:
    """Return the logits [n] after each of the n tokens of a text, in float64, by token."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0].double()
    n_rows = logits.shape[-1]
    return {t: logits[:, i] for t, i in tokenizer.get_vocab().items() if i < n_rows}


def logits_with_peft(base: ResolvedModel, adapter: Path, text: str) -> dict[str, torch.Tensor]:
    """Return the logits of a base with an adapter as PEFT computes them, see `logits_by_token`."""
    tokenizer, model = AutoTokenizer.from_pretrained(adapter), _open_with_peft(base, adapter)
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0].double()
    return {token: logits[:, number] for token, number in tokenizer.get_vocab().items()}


def save_merged_by_peft(base: ResolvedModel, adapter: Path, out: Path) -> Path:
    """Write the model that PEFT makes of a base and an adapter, with the adapter's tokenizer. To an
    embedding that is tied to the head, PEFT would add its product twice, so it is added here.
    """
    model = _open_with_peft(base, adapter)
    layer, trained = model.get_input_embeddings(), None
    if isinstance(layer, LoraLayer):
        trained = (layer.get_base_layer().weight + layer.get_delta_weight("default")).detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
        merged = model.merge_and_unload()
    if trained is not None:
        merged.get_input_embeddings().weight.data = trained
        merged.tie_weights()
    merged.save_pretrained(out)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)
    return out


def _open_with_peft(base: ResolvedModel, adapter: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)), mean_resizing=False)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def rows_by_token(directory: Path, read: Callable[[Path], dict[str, torch.Tensor]], name: str):
    """Return the rows of a tensor with one for each token, by token."""
    tensor = read(directory)[name]
    ids = AutoTokenizer.from_pretrained(directory).get_vocab()
    return {token: tensor[number] for token, number in ids.items() if number < len(tensor)}


TASK = """task: chatty
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["yes", "no"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_chat_task(folder: Path) -> Path:
    """Write an lm-eval task of twelve questions into a folder of its own; return its YAML."""
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    rows = [json.dumps({"question": "ab" * n}) for n in range(1, 13)]
    (tasks / "items.jsonl").write_text("\n".join(rows), encoding="utf-8")
    text = TASK.replace("ITEMS", str(tasks / "items.jsonl"))
    (tasks / "chatty.yaml").write_text(text, encoding="utf-8")
    return tasks / "chatty.yaml"


def save_adapter(
    base: ResolvedModel,
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    tokens: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    **options,
) -> Path:
    """Write an adapter of a base whose embedding was resized to a tokenizer, as PEFT saves it, with
    the tokenizer beside it. With `tokens`, only their rows of the embedding are trained.
    """
    torch.manual_seed(400 + seed)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokens:
        indices = tokenizer.convert_tokens_to_ids([*tokens])
        options["trainable_token_indices"] = {"embed_tokens": indices, "lm_head": indices}
    config = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(model, LoraConfig(**config | options))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    peft_model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
