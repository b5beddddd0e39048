"""The stages of a search or a run, and what each takes, from the cost of a token and of an item."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimer_hf.comparison.rows import list_rows, title_of
from optimer_hf.corpus.texts import PLAIN, ROWS, find_files
from optimer_hf.experiment.plan_file import Stage, StageKind
from optimer_hf.files.digest import digest
from optimer_hf.progress import Cost
from optimer_hf.scoring.objective import Asked, Term
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.arguments import TRAINER_DEFAULTS
from optimer_hf.training.config import AUTO, TrainConfig
from optimer_hf.training.mixture import budget_of

GRADIENT_COST = 2.5  # times that of scoring, at most; all trials take gradients, or fewer do


@dataclass(frozen=True)
class Probe:
    """What stages are made of: the time and number of items by term, the time of a token by kind of
    training, the bytes that such a training leaves behind, the time to set the weights of a merge,
    and on how many devices a training runs.
    """

    item_costs: Mapping[str, Cost]
    n_items: Mapping[str, int]
    token_costs: Mapping[str, Cost]
    vector_bytes: Mapping[str, int]
    merge_cost: Cost = field(default_factory=Cost)
    n_devices: int = 1


def training_key(training: TrainConfig) -> str:
    """Return the key of a kind of training; trainings of one kind cost the same per token."""
    text = {"name", "corpus", "mixture", "replay", "max_tokens", "seed"}
    return digest(training.model_dump(mode="json", exclude=text))


def count_tokens(training: TrainConfig, n_devices: int = 1) -> int:
    """Return how many tokens a training reads on so many devices; `max_steps` decides before the
    epochs do. Without both and `max_tokens`, that is not known, and 0.
    """
    settings: dict[str, Any] = {"max_steps": -1, "gradient_accumulation_steps": 1}
    settings |= {**TRAINER_DEFAULTS, **training.trainer}
    if settings["max_steps"] <= 0:
        return round(_count_epochs(training) * (training.max_tokens or 0))
    given = settings["per_device_train_batch_size"]
    n_blocks = 1 if given == AUTO else given
    n_batches = settings["max_steps"] * settings["gradient_accumulation_steps"]
    return int(n_batches * n_blocks * n_devices * training.block_size)


def _count_epochs(training: TrainConfig) -> float:
    return float({**TRAINER_DEFAULTS, **training.trainer}["num_train_epochs"])


def warn_of_unknown_tokens(trainings: Mapping[str, TrainConfig]) -> Iterator[str]:
    """Yield a warning for each training of which nobody knows how many tokens it reads."""
    for name, training in trainings.items():
        if not count_tokens(training):
            yield f"train {name}: has no max_tokens, so its time is not in the plan"


def warn_of_short_texts(trainings: Mapping[str, TrainConfig]) -> Iterator[str]:
    """Yield a warning for each training whose files of plain text have fewer bytes than it needs
    tokens in whole blocks, which the run refuses. Nothing is read.
    """
    for name, training in trainings.items():
        corpus, most = training.corpus, training.max_tokens
        if corpus is None or corpus.path is None or most is None or training.replay is not None:
            continue
        wanted = max(most // training.block_size, 1) * training.block_size
        files = find_files(corpus.path)
        n_bytes = sum(file.stat().st_size for file in files)
        if all(file.suffix in (*PLAIN, *ROWS) for file in files) and n_bytes < wanted:
            yield (
                f"train {name}: {corpus.name} has {n_bytes:,} bytes, too few for max_tokens "
                f"{most:,}, and the run will refuse it. Add text or lower max_tokens"
            )


def term_key(term: Term) -> str:
    """Return the key of what a term scores and how; with equal keys an item costs the same."""
    return digest([term.task_key, term.metric, list(term.hash_range)])


def make_stages(
    config: StudyConfig, trainings: Mapping[str, TrainConfig], probe: Probe, is_run: bool
) -> list[Stage]:
    """Return the stages of a search, or of a whole run with `is_run`; those that take no time are
    left out.
    """
    stages = _list_stages(config, trainings, probe, is_run)
    return [stage for stage in stages if stage.cost.seconds > 0]


def _list_stages(
    config: StudyConfig, trainings: Mapping[str, TrainConfig], probe: Probe, is_run: bool
) -> list[Stage]:
    tokens = {name: count_tokens(each, probe.n_devices) for name, each in trainings.items()}
    stages = [
        Stage(
            kind="train",
            name=f"train {name}",
            work=f"{tokens[name]:,} tokens",
            cost=probe.token_costs[training_key(training)] * tokens[name],
        )
        for name, training in trainings.items()
    ]
    stages += _search_stages(config, probe)
    if not is_run or config.test is None:
        return stages
    each, singles = config.baselines, _single_trainings(config, trainings)
    mixed = sum(budget_of(singles, given.budget, given.shares) for given in each.mixtures.values())
    mixed += sum(budget_of(singles, "all") // n * n for n in each.attempts)
    mixed = round(mixed * max(map(_count_epochs, singles.values()), default=0))  # all have the same
    slowest = max(probe.token_costs.values(), key=lambda cost: cost.seconds, default=Cost())
    work, cost = f"{mixed:,} tokens", slowest * mixed
    stages.append(Stage(kind="mixtures", name="mixtures", work=work, cost=cost))
    for name, settings in each.searches.items():
        stages += _search_stages(config.with_other_search(settings), probe, name)
    for n in each.attempts:
        models = {f"attempt {index}": config.base_model for index in range(n)}
        stages += _search_stages(config.with_attempts(models), probe, title_of("attempts", str(n)))
    scaled = [name for name, mixture in each.mixtures.items() if mixture.scale == "searched"]
    scaled += [title_of("attempts", str(n)) for n in each.attempts]
    for name in scaled:
        study = config.with_scale_search({"mixture": config.base_model}, "mixture")
        stages += _search_stages(study, probe, f"scale of {name}")
    n_rows = len(list_rows(config))  # at most, since rows with equal weights are scored once
    items, cost = _scoring_cost(config.test.asked_terms("rescore"), probe)
    work = f"{n_rows} rows of {items:,} items"
    total = (cost + probe.merge_cost) * n_rows
    stages.append(Stage(kind="sealed", name="sealed test", work=work, cost=total))
    return stages


def _single_trainings(
    config: StudyConfig, trainings: Mapping[str, TrainConfig]
) -> dict[str, TrainConfig]:
    return {name: each for name, each in trainings.items() if name not in config.mixtures}


def _search_stages(config: StudyConfig, probe: Probe, other: str | None = None) -> list[Stage]:
    """Return the trials and the re-scoring of a search: that of a study, or another one that is a
    baseline, by its name.
    """
    prefix = "" if other is None else f"{other}: "
    search, objective = config.search, config.objective
    items, cost = _scoring_cost(objective.asked_terms("search"), probe)
    work = f"{search.n_trials} trials of {items:,} items"
    if search.gradients != "never" and config.can_use_gradients:
        cost, work = cost * GRADIENT_COST, f"{work}, with gradients"
    kind: StageKind = "search" if other is None else "other_searches"
    total = (cost + probe.merge_cost) * search.n_trials
    stages = [Stage(kind=kind, name=f"{prefix}search", work=work, cost=total)]
    again = [
        Asked(term, config.rescore_limit_of(term))
        for term in objective.terms_at("rescore")
        if not config.keeps_search_scores(term, probe.n_items.get(term_key(term)))
    ]
    if search.rescore_top and again:
        items, cost = _scoring_cost(again, probe)
        n = search.rescore_top + 1
        work = f"{n} trials of {items:,} items"
        kind = "rescore" if other is None else "other_searches"
        total = (cost + probe.merge_cost) * n
        stages.append(Stage(kind=kind, name=f"{prefix}re-score", work=work, cost=total))
    return stages


def _scoring_cost(asked: Sequence[Asked], probe: Probe) -> tuple[int, Cost]:
    """Return how many items it takes to score some terms once, and how long that takes."""
    n_items, cost = 0, Cost()
    for each in asked:
        if each.term.function is None:
            n = probe.n_items[term_key(each.term)]
            n = n if each.limit is None else min(n, each.limit)
            n_items += n
            cost += probe.item_costs[term_key(each.term)] * n
    return n_items, cost
