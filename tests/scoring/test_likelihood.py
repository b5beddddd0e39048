"""likelihood.py: inputs that share rows are scored as if each stood alone."""

import pytest
import torch

from optimer_hf.scoring import likelihood
from optimer_hf.scoring.batching import Budget
from optimer_hf.scoring.likelihood import Likelihoods
from tests.support.tiny import VOCABULARY, tiny_model

WINDOW = 256


def requests_of(seed: int, n: int = 40):
    """Return contexts of 1 to 90 tokens, each with one to three continuations."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def tokens(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n,), generator=generator).tolist()

    contexts = [tokens(draw(1, 90)) for _ in range(n)]
    return [(None, context, tokens(draw(1, 9))) for context in contexts for _ in range(draw(1, 4))]


def one_at_a_time(model, requests):
    """Return log-likelihood and greediness of each request alone, in float64."""
    model = model.double()
    answers = []
    for _, context, continuation in requests:
        tokens = (context + continuation)[-(WINDOW + 1) :]
        logits = model(torch.tensor([tokens[:-1]])).logits[0, -len(continuation) :].double()
        targets = torch.tensor(continuation)
        chosen = logits.log_softmax(-1).gather(1, targets[:, None])
        answers.append((float(chosen.sum()), bool((logits.argmax(-1) == targets).all())))
    return answers


@pytest.mark.parametrize("shares_rows", [False, True], ids=["padded", "packed"])
@torch.no_grad()
def test_likelihoods_equal_those_of_each_request_alone(kind, shares_rows):
    model = tiny_model(kind).eval()
    requests = [*requests_of(0), (None, [7] * 300, [5, 6]), (None, [9], [3])]
    greedy = model(torch.tensor([[9, 9, 9]])).logits[0, -1].argmax()
    requests.append((None, [9, 9, 9], [int(greedy)]))
    likelihoods = Likelihoods(model, WINDOW, shares_rows=shares_rows)
    answers, n_tokens = likelihoods.of(requests)
    expected = one_at_a_time(model, requests)
    assert [value for value, _ in answers] == pytest.approx([v for v, _ in expected], rel=1e-5)
    assert [is_greedy for _, is_greedy in answers] == [is_greedy for _, is_greedy in expected]
    assert answers[-1][1] and n_tokens == sum(
        map(len, {tuple((a + b)[-(WINDOW + 1) : -1]) for _, a, b in requests})
    )


def test_rows_are_shared_so_that_few_places_are_padding():
    model, seen = tiny_model().eval(), []
    likelihoods = Likelihoods(model, WINDOW, shares_rows=True)
    likelihoods._budget = Budget(2**14)
    model.base_model.register_forward_pre_hook(
        lambda _, args, options: seen.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    _, n_tokens = likelihoods.of(requests_of(1, n=100))
    assert all(width <= WINDOW for _, width in seen)
    assert sum(n * width for n, width in seen) < 1.06 * n_tokens


def test_a_model_that_cannot_keep_inputs_apart_gets_one_in_each_row():
    model = tiny_model().eval()
    apart = Likelihoods(model, WINDOW, shares_rows=True).of(requests_of(2))[0]
    mixed = tiny_model().eval()
    plain = mixed.base_model.forward  # a model in which every token sees all before it in its row

    def forward(*arguments, position_ids=None, **options):
        return plain(*arguments, **options)

    mixed.base_model.forward = forward
    answers = Likelihoods(mixed, WINDOW, shares_rows=True).of(requests_of(2))[0]
    assert [v for v, _ in answers] == pytest.approx([v for v, _ in apart], rel=1e-4)


def test_too_little_memory_changes_no_score():
    model = tiny_model().eval()
    requests = requests_of(3)
    expected, _ = Likelihoods(model, WINDOW, shares_rows=False).of(requests)

    def refuse(_, args, options) -> None:
        if options["input_ids"].numel() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for shares_rows in (False, True):
        likelihoods = Likelihoods(model, WINDOW, shares_rows=shares_rows)
        hook = model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
        answers, _ = likelihoods.of(requests)
        hook.remove()
        assert [v for v, _ in answers] == pytest.approx([v for v, _ in expected], rel=1e-5)


def test_scores_follow_the_weights_although_batches_are_kept():
    model, requests = tiny_model().eval(), requests_of(4)
    likelihoods = Likelihoods(model, WINDOW, shares_rows=True)
    first, _ = likelihoods.of(requests)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    second, _ = likelihoods.of(requests)
    fresh, _ = Likelihoods(model, WINDOW, shares_rows=True).of(requests)
    assert second == fresh and second != first


def test_no_requests_have_no_answers():
    assert Likelihoods(tiny_model().eval(), WINDOW, shares_rows=True).of([]) == ([], 0)


def test_sums_on_a_device_are_those_on_the_host():
    lengths = [3, 0, 1, 40]
    values = torch.randn(44, generator=torch.Generator().manual_seed(0))
    greedy = values > -2
    greedy[:4] = torch.tensor([True, False, True, True])
    on_device = likelihood._join_on_device(values, greedy, lengths)
    on_host = likelihood._join(values, greedy, lengths)
    assert [flag for _, flag in on_device] == [flag for _, flag in on_host]
    assert [flag for _, flag in on_host[:3]] == [False, True, True]
    for (one, _), (other, _) in zip(on_device, on_host, strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
