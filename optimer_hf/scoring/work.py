"""Objectives + a model without weights -> how many tokens it takes to score them.

A few items of each task are turned into lm-eval's requests, with their prompts and examples, and
counted. No model runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optimer_hf.scoring.harness import quiet_lm_eval
from optimer_hf.scoring.items import indices_within, refuse_no_items, spread_indices
from optimer_hf.scoring.objective import Objective, Term, naming_test
from optimer_hf.scoring.tasks import load_tasks

N_COUNTED = 16  # items of each term


@dataclass(frozen=True)
class ItemWork:
    """What an item of a term takes on average: inputs that a model reads, tokens in each of them,
    and tokens that it may generate after each. `n_items` is how many items the term has.
    """

    n_items: int
    n_inputs: float
    n_read: float
    n_written: float


def count_work(
    objectives: Sequence[Objective], model: Any, tokenizer: Any
) -> dict[tuple[str, tuple[float, float]], ItemWork]:
    """Return what the items of each term of some objectives take, by `key_of_items`. Terms that a
    Python function scores are left out.

    The model may be on the device `meta`. Raises EvaluationError for a task that does not exist,
    and for a term without items.
    """
    tasks = load_tasks(objectives)
    works: dict[tuple[str, tuple[float, float]], ItemWork] = {}
    with quiet_lm_eval():
        counter = _make_counter(model, tokenizer)
        for objective in objectives:
            with naming_test(objectives, objective):
                for term in (each for each in objective.scored_terms if each.function is None):
                    work = _count_term(term, tasks[term.task_key], counter, objective)
                    works[key_of_items(term)] = work
    return works


def key_of_items(term: Term) -> tuple[str, tuple[float, float]]:
    """Return what decides the items of a term and how they are prompted."""
    return term.task_key, term.hash_range


def _count_term(term: Term, task: Any, counter: Any, objective: Objective) -> ItemWork:
    within = indices_within(task, term.hash_range, objective.split_by)
    refuse_no_items(term, within)
    few = [within[index] for index in spread_indices(len(within), N_COUNTED)]
    has_template = objective.apply_chat_template
    task.build_all_requests(
        samples=few,
        chat_template=counter.apply_chat_template if has_template else None,
        tokenizer_name=counter.tokenizer_name if has_template else "",
        **objective.prompting,
    )
    counter.inputs = []
    for kind in sorted({request.request_type for request in task.instances}):
        requests = [each for each in task.instances if each.request_type == kind]
        getattr(counter, kind)(requests, disable_tqdm=True)
    n_inputs = max(len(counter.inputs), 1)
    n_read, n_written = (sum(each) / n_inputs for each in zip(*counter.inputs, strict=True))
    return ItemWork(len(within), n_inputs / len(few), n_read, n_written)


def _make_counter(model: Any, tokenizer: Any) -> Any:
    """Return an lm-eval model that counts tokens in `inputs`, as pairs (read, written at most)."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Counter(HFLM):
        """HFLM, but it answers nothing."""

        inputs: list[tuple[int, int]] = []

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            unique = {tuple([*context, *answer][:-1]) for _, context, answer in requests}
            self.inputs += [(min(len(tokens), self.max_length), 0) for tokens in unique]
            return [(0.0, False)] * len(requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            for request in requests:
                settings = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
                n_read = len(self.tok_encode(request.args[0]))
                self.inputs.append((n_read, int(settings["max_gen_toks"])))
            return [""] * len(requests)

    return Counter(pretrained=model, tokenizer=tokenizer, batch_size=8, trust_remote_code=False)
