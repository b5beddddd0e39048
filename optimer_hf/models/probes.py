"""Find out what a model does by running it on a few tokens."""

from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.errors import ModelError
from optimer_hf.models.head_loss import IGNORED_LABEL
from optimer_hf.models.placement import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8  # per document
LARGEST_SHIFT, LARGEST_SHIFT_16_BITS = 1e-3, 0.02  # of logits, in standard deviations
LARGEST_CHANGE = 1e-4  # relative; masked tokens may change a hidden state by rounding only


def keeps_documents_apart(model: "PreTrainedModel") -> bool:
    """Whether a model reads a second document in a block as if it stood alone.

    Attention masks respect positions that restart, but the state of recurrent and convolutional
    layers carries over. A few probe tokens decide.
    """
    ids = probe_ids(model, 3 * PROBE_TOKENS, input_device(model))
    one, another, second = ids.view(3, PROBE_TOKENS)
    blocks = torch.stack([torch.cat([first, second]) for first in (one, another)])
    positions = torch.arange(PROBE_TOKENS, device=ids.device).repeat(2, 2)
    with torch.no_grad():
        try:
            hidden = model.base_model(
                input_ids=blocks, position_ids=positions, use_cache=False
            ).last_hidden_state
        except (AttributeError, TypeError):  # the model takes no positions
            return False
    after_one, after_another = hidden[:, PROBE_TOKENS:].float()
    change = (after_one - after_another).abs().max()
    return bool(change <= LARGEST_CHANGE * after_one.abs().mean())


def refuse_reading_ahead(model: "PreTrainedModel") -> None:
    """Raise ModelError for a model that reads what it is asked for, see `reads_ahead`."""
    if reads_ahead(model):
        raise ModelError(
            f"{type(model).__name__}: is not causal: it reads the tokens that come after the one "
            "that it predicts, so its loss and its likelihoods mean nothing. Use a model that "
            "predicts text from left to right (of BERT's family, one with `is_decoder: true` in "
            "its config.json)."
        )


def reads_ahead(model: "PreTrainedModel") -> bool:
    """Whether what a model computes for a token depends on later ones, as in encoders such as BERT
    and with `use_bidirectional_attention`: it would be asked for what it has read.

    Another last token may change the rounding of what comes before it (experts multiply their
    tokens together), so a derivative decides where anything changes.
    """
    ids = probe_ids(model, PROBE_TOKENS + 1, input_device(model))
    pair = torch.stack([ids[:-1], torch.cat([ids[:-2], ids[-1:]])])
    try:
        with torch.no_grad():
            one, other = _hidden_states(model, pair)[:, :-1]
        return not torch.equal(one, other) and _depends_on_last(model, pair[:1])
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it cannot be run so
        return False


def _hidden_states(model: "PreTrainedModel", ids: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.float()


def _depends_on_last(model: "PreTrainedModel", ids: torch.Tensor) -> bool:
    """Whether the derivative of the first hidden states in the last embedding is not zero."""
    embedded: list[torch.Tensor] = []

    def note(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(note)
    try:
        with torch.enable_grad():
            first = _hidden_states(model, ids)[0, 0]
            (gradient,) = torch.autograd.grad(first.square().sum(), embedded[0])
    finally:
        hook.remove()
    known = gradient[0, -1]
    return bool(known[known.isfinite()].any())  # NaN of a model that overflows says nothing


@torch.no_grad()
def keeps_padding_out(model: "PreTrainedModel") -> bool:
    """Whether a prompt with padding before it is continued as it is alone.

    The states of some recurrent and linear-attention models (RWKV, RecurrentGemma, MiniMax) go
    through the padding, whatever the attention mask says.
    """
    pad = PROBE_TOKENS // 2
    ids = probe_ids(model, 2 * PROBE_TOKENS, input_device(model)).view(2, PROBE_TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    alone = ids[:1, pad:]
    try:
        padded = _generated_logits(model, ids, mask)[0]
        expected = _generated_logits(model, alone, torch.ones_like(alone))[0]
    except (AttributeError, TypeError, ValueError, RuntimeError):  # nothing is known of it
        return True
    n = 2 if padded[0].argmax() == expected[0].argmax() else 1  # near ties part by rounding
    largest = LARGEST_SHIFT if model.dtype == torch.float32 else LARGEST_SHIFT_16_BITS
    return bool((padded[:n] - expected[:n]).abs().mean() <= largest * expected[:n].std())


def _generated_logits(
    model: "PreTrainedModel", ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return the logits [n, 2, vocabulary] of two tokens that `generate` chooses after prompts."""
    output: Any = model.generate(
        ids,
        attention_mask=mask,
        min_new_tokens=2,
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits, 1).float()


@torch.no_grad()
def sharded_keeps_documents_apart(model: "PreTrainedModel", root: torch.nn.Module) -> bool:
    """Do as `keeps_documents_apart` for a model whose parameters are spread over processes."""
    one, another, second = probe_ids(model, 3 * PROBE_TOKENS, model.device).view(3, -1)
    positions = torch.arange(PROBE_TOKENS, device=second.device).repeat(1, 2)
    losses = []
    for first in (one, another):
        ids = torch.cat([first, second]).unsqueeze(0)
        labels = ids.clone()
        labels[:, : PROBE_TOKENS + 1] = IGNORED_LABEL
        losses.append(probe_loss(root, ids, labels, positions))
    return bool(torch.isclose(losses[0], losses[1], rtol=LARGEST_CHANGE))


def probe_ids(model: "PreTrainedModel", n: int, device: torch.device | str) -> torch.Tensor:
    """Return n token ids, the same ones in every process."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.arange(n, device=device).remainder(vocabulary)


def probe_loss(
    root: torch.nn.Module,
    ids: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of one block, with dropout off."""
    was_training = root.training
    root.eval()
    output = root(input_ids=ids, labels=labels, position_ids=positions, use_cache=False)
    root.train(was_training)
    loss: torch.Tensor = output.loss.float()
    return loss
