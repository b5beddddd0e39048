"""Find out what a model does by running it on a few tokens."""

from typing import TYPE_CHECKING

import torch

from optimer_hf.models.head_loss import IGNORED_LABEL
from optimer_hf.models.placement import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8  # per document
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
