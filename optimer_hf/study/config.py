"""The fields of a study file: vectors, objective, search, test and baselines."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from optimer_hf.files.digest import digest
from optimer_hf.files.model import FileModel, Mistake, WrittenFile, parse
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.reference import (
    AnyPath,
    ReferenceText,
    RelativeText,
    TokenizerSource,
    tokenizer_reference,
)
from optimer_hf.files.text import did_you_mean, quote
from optimer_hf.models.union import Vocabulary
from optimer_hf.scoring.objective import Objective, Term, split_of
from optimer_hf.study.engine import TRANSFORMERS, EngineEntry
from optimer_hf.vectors.groups import (
    GRADIENT,
    INSIDE,
    LAYERS,
    Groups,
    confusable_names,
)

LARGEST_WEIGHT = 1000.0  # of one vector; merges break long before
LARGEST_SEARCH, LARGEST_LIMIT = 10_000, 10**7  # trials; items
MOST_VECTORS, NARROWEST = 1000, 1e-3
MOST_ATTEMPTS = 100  # at a mixture, which all have to fit into the tokens of the vectors
MOST_GROUPS = 100  # of one vector
SCALE_TRIALS = 8  # of the search for the scale of a mixture
LONGEST_NAME = 200  # characters of a vector's name
MergeMethod = Literal["ties", "dare_ties", "model_stock"]
Weight = Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)]
BOUNDS = (0.0, 1.5)  # of a weight, unless the study gives others
Range = tuple[tuple[float, float], float | None]  # bounds of a weight, and its fixed value
LARGEST_TOTAL = LARGEST_WEIGHT * MOST_VECTORS
Total = Annotated[float, Field(ge=-LARGEST_TOTAL, le=LARGEST_TOTAL)]
TRACKERS = (  # that transformers reports to; one that it drops stays, so that old studies are read
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow"),
    *("mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)
DEVICES = re.compile(r"cpu|disk|(cuda:)?\d{1,3}")
AMOUNT = re.compile(r"\d+(\.\d+)? ?[KMGT]i?B", re.IGNORECASE)
Strategy = Literal["auto", "balanced", "balanced_low_0", "sequential"]
PluginName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Share = Annotated[float, Field(ge=-1e6, le=1e6)]  # each use says what is wrong below 0


Shares = dict[str, Share] | Literal["uniform", "searched"]
Budget = Literal["all", "mixed", "one"]


def _idle_bounds(bounds: tuple[float, float] | None, fixed: float | None) -> Iterator[Mistake]:
    """Yield bounds beside a fixed weight, which is not searched."""
    if fixed is not None and bounds not in (None, BOUNDS):
        yield ("bounds",), "does nothing beside 'fixed'; leave it out"


def _mistakes_of_bounds(bounds: tuple[float, float]) -> Iterator[Mistake]:
    low, high = bounds
    if low >= high:
        message = f"bounds {[low, high]} are empty; give [low, high] with low < high, or 'fixed'"
        yield ("bounds",), message
    elif high < low + NARROWEST:
        message = f"bounds {[low, high]} are closer than {NARROWEST:g}; give 'fixed' instead"
        yield ("bounds",), message


class GroupConfig(FileModel):
    """The weight of one group of tensors of a vector."""

    bounds: tuple[Weight, Weight] | None = Field(
        default=None, examples=[[0.0, 1.2]], json_schema_extra={"unit": "weight"}
    )
    """Lowest and highest weight that the search may try, as [low, high]. Default: those of the
    vector.
    """
    fixed: Weight | None = Field(default=None, examples=[0.0], json_schema_extra={"unit": "weight"})
    """Keep the group in every merge at this weight instead of searching its weight."""
    groups: int | None = Field(
        default=None,
        ge=2,
        le=MOST_GROUPS,
        exclude_if=lambda value: value is None,
        examples=[3],
        json_schema_extra={"unit": "groups"},
    )
    """Under `layers` alone, the number of groups of neighbouring layers; under `gradient` alone, or
    after a group (mlp/gradient), the number of values along the layers.
    """

    def mistakes(self) -> Iterator[Mistake]:
        if self.bounds is not None:
            yield from _mistakes_of_bounds(self.bounds)

    def idle_fields(self) -> Iterator[Mistake]:
        yield from _idle_bounds(self.bounds, self.fixed)

    @property
    def has_own(self) -> bool:
        """Whether the group does not take the bounds of its vector."""
        return self.bounds is not None or self.fixed is not None


def _expand_groups(value: Any) -> Any:
    """Return groups as a mapping: a list names them, an empty group has the defaults, and a number
    under `layers`, `gradient` or `NAME/gradient` is that of its groups.
    """
    if isinstance(value, list) and all(isinstance(key, str) for key in value):
        value = dict.fromkeys(value)
    if not isinstance(value, dict):
        return value
    expanded = {key: {} if group is None else group for key, group in value.items()}
    for key, n_groups in expanded.items():
        if _is_counted(key) and isinstance(n_groups, int | float):
            expanded[key] = {"groups": n_groups}
    return expanded


def _is_counted(key: Any) -> bool:
    """Whether groups under a key may be given by their number."""
    return key == LAYERS or str(key).split(INSIDE)[-1] == GRADIENT


NumberOfGroups = Annotated[int, Field(ge=2, le=MOST_GROUPS)]
By = Annotated[
    dict[str, GroupConfig],
    Field(min_length=1, max_length=MOST_GROUPS),
    BeforeValidator(
        _expand_groups,
        json_schema_input_type=dict[str, GroupConfig | NumberOfGroups | None] | list[str],
    ),
]


def _given_keys(by: By) -> dict[str, str]:
    """Return the key of each weight of groups, with the key that it is given by."""
    keys: dict[str, str] = {}
    for own, group in by.items():
        n = group.groups or 0
        keys |= {f"{own}.{number + 1}": own for number in range(n)} or {own: own}
    return keys


def _mistakes_of_shares(shares: Mapping[str, float] | str) -> Iterator[Mistake]:
    values = [1.0] if isinstance(shares, str) else shares.values()
    if not sum(values) > 0 or min(values) < 0:
        yield ("shares",), "shares must be >= 0, and one > 0"


class VectorConfig(FileModel):
    """One vector of the pool. Give one of `source`, `train` and `mixture`."""

    source: ReferenceText | None = Field(
        default=None, examples=["you/gemma-3-270m-math", "./my-code-lora"]
    )
    """Where the vector is: a directory, a Hub id (org/name or org/name@revision) or pypi:PACKAGE.
    It may be a fine-tuned model, a LoRA adapter, or a delta that `optimer extract` wrote.
    """
    train: RelativeText | None = Field(default=None, examples=["train-math.yaml"])
    """Train file of the same recipe folder, from which `optimer run` trains the vector."""
    mixture: Shares | None = Field(
        default=None,
        examples=["uniform", {"math": 2, "code": 1}],
        json_schema_extra={"unit": "share"},
        exclude_if=lambda value: value is None,
    )
    """Train the vector on the mixed text of the other vectors, with `optimer run`. uniform: equal
    shares of all that have a train file. Or the share of each, as {vector: share}; shares need not
    sum to 1. Beside a `source`, the shares that the vector there was trained on.
    """
    budget: Budget = Field(default="all", examples=["one"], exclude_if=lambda value: value == "all")
    """Number of tokens that a mixture is trained on. all: as many as all vectors with a train file
    together. mixed: as many as those that it mixes together. one: as many as one of all on average.
    """
    bounds: tuple[Weight, Weight] = Field(
        default=BOUNDS, examples=[[0.0, 1.2]], json_schema_extra={"unit": "weight"}
    )
    """Lowest and highest weight that the search may try, as [low, high]."""
    fixed: Weight | None = Field(default=None, examples=[1.0], json_schema_extra={"unit": "weight"})
    """Keep the vector in every merge at this weight instead of searching its weight."""
    by: By | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        examples=[["self_attn", "mlp", "else"], {"layers": 3}, {"mlp": {"fixed": 0}, "else": {}}],
        json_schema_extra={"unit": "groups"},
    )
    """Split the vector into groups of tensors, each with a weight of its own. By names, as with
    mergekit's filters: a tensor belongs to the first group that is a part of its name, and `else`,
    the last one, takes the rest; each may have its own `bounds` or `fixed`. Or {layers: N}: N
    groups of neighbouring layers, the first with what is in no layer; or [layers.0:8, layers.8:24],
    with the ends of each. Or {gradient: N}: N weights along the layers, between which those of the
    layers are interpolated, as with mergekit's gradients. All three together, in this order:
    layers.0:8/mlp, mlp/gradient, layers.0:8/mlp/gradient. Two or three groups are enough to begin
    with, as each is one more weight to search.
    """

    def mistakes(self) -> Iterator[Mistake]:
        given = [name for name in ("source", "train", "mixture") if getattr(self, name) is not None]
        if len(given) != 1 and given != ["source", "mixture"]:
            yield (
                (),
                "give exactly one of 'source' (a directory or Hub id), 'train' (a train file of "
                "the recipe folder) and 'mixture' (shares of the other vectors' text)",
            )
        yield from self._mistakes_of_mixture()
        yield from _mistakes_of_bounds(self.bounds)
        if self.by is not None:
            yield from self._mistakes_of_groups(self.by)

    def idle_fields(self) -> Iterator[Mistake]:
        yield from _idle_bounds(self.bounds, self.fixed)
        groups = [] if self.by is None else self.by.values()
        if groups and self.bounds != BOUNDS and all(each.has_own for each in groups):
            message = "does nothing, since every group in 'by' has its own or is fixed"
            yield ("bounds",), f"{message}; leave it out"
        if self.source is not None and self.mixture is not None and self.budget != "all":
            yield ("budget",), "does nothing beside 'source', which is trained; leave it out"

    def _mistakes_of_groups(self, by: By) -> Iterator[Mistake]:
        if self.fixed is not None:
            yield ("fixed",), "with 'by', each group has its own; give it there"
        whole = next((key for key in (LAYERS, GRADIENT) if key in by and by[key].groups), None)
        if whole is not None:
            if len(by) > 1:
                message = f"'{whole}' splits the whole vector; leave the other groups out"
                yield ("by",), message
            return
        for key, group in by.items():
            if group.groups is not None and not _is_counted(key):
                message = f"only '{LAYERS}' and '{GRADIENT}' have groups of their own; leave it out"
                yield ("by", key, "groups"), message
        if len(by) == 1:
            yield ("by",), "one group is the whole vector; give two, or leave 'by' out"
        keys = list(_given_keys(by))
        for key, message in Groups.of_keys(keys).mistakes(keys):
            yield ("by", key) if key in by else ("by",), message

    @property
    def groups(self) -> Groups | None:
        """How the vector is split; None: it is whole."""
        return None if self.by is None else Groups.of_keys(_given_keys(self.by))

    def weights_of(self, name: str) -> "dict[str, Range]":
        """Return the weights of the vector under its `name`, one or that of each group, each with
        the bounds and the fixed value.
        """
        if self.groups is None or self.by is None:
            return {name: (self.bounds, self.fixed)}
        given = {key: self.by[own] for key, own in _given_keys(self.by).items()}
        names = self.groups.names_of(name)
        return {
            weight: (given[key].bounds or self.bounds, given[key].fixed)
            for key, weight in names.items()
        }

    def with_fixed(self, name: str, weights: Mapping[str, float]) -> "VectorConfig":
        """Return the vector with those of its weights fixed that `weights` has, by name; `name` is
        that of the vector.
        """
        if self.groups is None:
            return self.model_copy(update={"fixed": weights.get(name, self.fixed)})
        own, names = self.weights_of(name), self.groups.names_of(name)
        by = {
            key: GroupConfig(bounds=own[weight][0], fixed=weights.get(weight, own[weight][1]))
            for key, weight in names.items()
        }
        return self.model_copy(update={"by": by})

    def _mistakes_of_mixture(self) -> Iterator[Mistake]:
        if self.mixture is None and self.budget != "all":
            yield ("budget",), "it goes with 'mixture'; leave it out"
        if self.mixture == "searched":
            yield (
                ("mixture",),
                "found 'searched', but its ratios come from a search that is still to run. Run it "
                "without this vector, then give the shares that `optimer ratios` prints",
            )
        elif self.mixture == "uniform" and self.source is not None:
            yield ("mixture",), "beside a 'source', give the shares as {vector: share}"
        elif self.mixture is not None:
            for _, message in _mistakes_of_shares(self.mixture):
                yield ("mixture",), message


def _expand_source(value: Any) -> Any:
    """Return the fields of a vector; a text or a path alone is its source."""
    return {"source": value} if isinstance(value, str | os.PathLike) else value


# a text stands for {"source": text}
VectorEntry = Annotated[
    VectorConfig, BeforeValidator(_expand_source, json_schema_input_type=str | VectorConfig)
]


class SearchConfig(FileModel):
    """How many trials to run, how to choose them, and how to re-score the best."""

    n_trials: int = Field(
        default=30, gt=0, le=LARGEST_SEARCH, examples=[100], json_schema_extra={"unit": "trials"}
    )
    """Number of merges to score, including the first ones, which every search has in common: the
    base, each vector alone at 0.7, and the average.
    """
    surrogate: Literal["per_term", "black_box", "random_forest", "random"] = Field(
        default="per_term", examples=["random"]
    )
    """Model that chooses the next weights. per_term: one Gaussian process for each term.
    black_box: SMAC's Gaussian process of the combined value, which takes about a second to choose,
    longer than a trial of a small model on a GPU. random_forest: SMAC's random forest. random: no
    model, random weights.
    """
    sampler: PluginName | None = Field(
        default=None, exclude_if=lambda name: name is None, examples=["my-sampler"]
    )
    """Installed sampler that chooses the weights in place of the surrogate: the name of an entry
    point of the group optimer.samplers.
    """
    total: tuple[Total, Total] | None = Field(
        default=None, examples=[[0.5, 1.5]], json_schema_extra={"unit": "weight"}
    )
    """Lowest and highest sum of the searched weights, as [low, high]. Needs surrogate per_term or
    random. Without it, only the bounds of each vector apply.
    """
    pareto: bool = Field(default=False, examples=[True])
    """Spread the trials along the Pareto front of the terms, each trial with its own random
    weighting of the terms (ParEGO; Knowles, IEEE TEVC 2006), instead of looking for a single
    optimum. Needs at least two terms with a weight above 0.
    """
    spread: bool = Field(default=True, examples=[False])
    """From the twentieth trial on, choose every second trial for a random weighting of the terms.
    The study can then answer other objectives, and it does not settle on a lucky score. Only with
    surrogate per_term.
    """
    gradients: Literal["auto", "always", "never"] = Field(
        default="never", exclude_if=lambda choice: choice == "never", examples=["auto"]
    )
    """Whether trials also take gradients: from one backward pass the derivative of every term in
    every weight. Such a trial takes two to three times as long, and the surrogate needs far fewer
    of them. auto: take them if the time and the gradients of the base say that they pay. Needs
    surrogate per_term and engine transformers.
    """
    screen: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_VECTORS)] | None = Field(
        default=None,
        exclude_if=lambda choice: choice is None,
        examples=[8, "auto"],
        json_schema_extra={"unit": "vectors"},
    )
    """Number of vectors to search in a large pool. The base and the average take gradients,
    whatever `gradients` says, and the vectors that promise most by their slopes are searched: in
    turn for the objective and for each term. The others stay at 0. auto: all where later trials
    take gradients; else those with which the objective rises at one of the two, at most sixteen.
    Each group of a vector with `by` counts as a vector. A study can raise the number and go on.
    Default: all vectors.
    """
    seed: int = Field(default=0, ge=0, lt=2**32, examples=[1])
    """Seed of the search, of random vectors and of DARE's masks."""
    rescore_top: int = Field(
        default=3, ge=0, le=LARGEST_SEARCH, examples=[5], json_schema_extra={"unit": "trials"}
    )
    """Number of best trials to score again on more items before choosing the best; 0 skips this."""
    rescore_limit: int | None = Field(
        default=None, gt=0, le=LARGEST_LIMIT, examples=[300], json_schema_extra={"unit": "items"}
    )
    """Number of items for each term when re-scoring, at least as many as in the search. Default:
    all items.
    """
    report_to: list[str] = Field(default=[], examples=[["wandb"]])
    """Where to log every trial, by the names that the HF Trainer knows: tensorboard, wandb, ..."""

    def mistakes(self) -> Iterator[Mistake]:
        for index, name in enumerate(self.report_to):
            if name not in TRACKERS:
                close = did_you_mean(name, list(TRACKERS))
                hint = close if "mean" in close else ""
                expected = f"Expected one of {', '.join(TRACKERS)}"
                yield ("report_to", index), f"found {quote(name)}.{hint} {expected}"

    def idle_fields(self) -> Iterator[Mistake]:
        for name in ("surrogate", "pareto"):
            value = getattr(self, name)
            if self.sampler is not None and value != SearchConfig.model_fields[name].default:
                message = "does nothing beside 'sampler', which chooses the weights"
                yield (name,), f"{message}; leave it out"
        if self.rescore_top == 0 and self.rescore_limit is not None:
            message = "does nothing where rescore_top is 0; leave it out, or raise that"
            yield ("rescore_limit",), message


class SearchBaseline(SearchConfig):
    """Another search with its own settings, to compare with."""

    limit: int | None = Field(
        default=None, gt=0, le=LARGEST_LIMIT, examples=[10], json_schema_extra={"unit": "items"}
    )
    """Number of items for each term, instead of the limits of the objective."""
    without: list[str] = Field(
        default=[], exclude_if=lambda names: not names, examples=[["instruct"]]
    )
    """Vectors that it leaves out of the merge, at weight 0."""


class MixtureBaseline(FileModel):
    """A model trained on the mixed data by `optimer run`, to compare with."""

    shares: Shares = Field(
        default="uniform", examples=[{"math": 3, "code": 1}], json_schema_extra={"unit": "share"}
    )
    """Share of each vector's corpus, as {vector: share}; shares need not sum to 1. uniform: equal
    shares. searched: the weights of the merge, read as ratios (see `optimer ratios`).
    """
    budget: Budget = Field(default="all", examples=["one"])
    """Number of tokens to train on. all: as many as all vectors together. mixed: as many as those
    that it mixes together. one: as many as one vector on average.
    """
    scale: Literal["one", "searched"] = Field(
        default="one", examples=["searched"], exclude_if=lambda value: value == "one"
    )
    """Scale of the trained model minus the base. searched: add a row at the scale that is best on
    the items of the search, which a search of eight trials finds.
    """

    def mistakes(self) -> Iterator[Mistake]:
        yield from _mistakes_of_shares(self.shares)


class Baselines(FileModel):
    """What `optimer compare` and `optimer run` compare the merge with, beyond other weights of the
    same vectors.
    """

    weights: dict[str, Annotated[dict[str, Weight], Field(min_length=1)]] = Field(
        default={},
        exclude_if=lambda rows: not rows,
        examples=[{"by hand": {"math": 0.5, "code": 0.5}}],
        json_schema_extra={"unit": "weight"},
    )
    """Weights that somebody has guessed, as {vector: weight}, each set under the name of its row in
    the tables. A vector that is left out has weight 0, and a fixed one its own. With groups (`by`),
    the name of a vector stands for all of its searched groups, and `math.mlp` for one. A search
    from a mergekit YAML has such a row for the weights in it.
    """
    plugins: list[PluginName] = Field(default=[], examples=[["my-baseline"]])
    """Installed baselines: names of entry points of the group optimer.baselines. Each returns
    weights of the same vectors, or a model.
    """
    merge_methods: list[MergeMethod] = Field(default=[], examples=[["ties", "dare_ties"]])
    """Other merge methods to run on the same vectors, through mergekit."""
    random_vectors: bool = Field(default=False, examples=[True])
    """Compare with random vectors of the same norms, merged at the same weights. A merge that is
    not better has learned nothing from its vectors.
    """
    searches: dict[str, SearchBaseline] = Field(
        default={}, examples=[{"random": {"surrogate": "random"}}]
    )
    """Other searches over the same vectors, each under the name of its row in the tables."""
    models: dict[str, ReferenceText] = Field(
        default={}, examples=[{"mixed": "./trained-on-the-mixture"}]
    )
    """Other models or adapters trained from the base, each under the name of its row in the
    tables.
    """
    mixtures: dict[str, MixtureBaseline] = Field(
        default={}, examples=[{"uniform": {"shares": "uniform"}}]
    )
    """Models that `optimer run` trains on the mixed data, each under the name of its row in the
    tables.
    """
    attempts: list[Annotated[int, Field(ge=1, le=MOST_ATTEMPTS)]] = Field(
        default=[],
        exclude_if=lambda numbers: not numbers,
        examples=[[1, 2, 4, 8]],
        json_schema_extra={"unit": "mixtures"},
    )
    """Data mixtures at the cost of the vectors, the search for the ratio included. For each number
    R, `optimer run` trains R mixtures, each on 1/R of the tokens of all vectors together: the first
    one with equal shares, the others with random ones. The best by the items of the search is a
    row, and so is that one at its best scale.
    """

    @property
    def n_trained_models(self) -> int:
        """How many models `optimer run` trains to compare with."""
        return len(self.mixtures) + sum(self.attempts)


class StudyConfig(WrittenFile):
    """study.yaml: which vectors to merge, what to score the merges on, and how to search."""

    base_model: ReferenceText = Field(examples=["google/gemma-3-270m"])
    """Model that all vectors were trained from: a directory, a Hub id (org/name or
    org/name@revision) or pypi:PACKAGE.
    """
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", examples=["float32"]
    )
    """dtype of the merged model, in the trials and on disk. Sums are always formed in float32."""
    device_map: Strategy | dict[str, int | str] | None = Field(default=None, examples=["auto"])
    """How to spread the model of the trials over devices if it is larger than one GPU: a strategy
    of accelerate (auto, balanced, balanced_low_0, sequential), or a device for each module, as
    {model.layers.0: 0, lm_head: cpu}: the number of a GPU, cpu or disk. Default: one device.
    """
    max_memory: dict[str | int, str] | None = Field(
        default=None, examples=[{"0": "60GiB", "cpu": "200GiB"}]
    )
    """Most memory that the model may take of each device, as {0: 60GiB, cpu: 200GiB}. Leave room
    for the vectors and a second copy of the base. Needs device_map.
    """
    engine: EngineEntry = Field(default=TRANSFORMERS, examples=["vllm"])
    """What holds and scores the merges: transformers (the default) or vllm, with its options:
    {name: vllm, tensor_parallel_size: 2}. It is part of the study, since two engines round
    differently.
    """
    vectors: dict[str, VectorEntry] = Field(
        min_length=1,
        max_length=MOST_VECTORS,
        examples=[{"math": "you/gemma-3-270m-math", "code": "./my-code-lora"}],
    )
    """Vectors to merge, by name. A plain text is short for its source:
    {math: you/gemma-math, code: {source: ./code-lora, bounds: [0, 1.2]}}.
    """
    tokenizer_source: TokenizerSource = Field(default=None, examples=["base"])
    """Where the merge takes its tokenizer, chat template and generation config from: base (the
    default), the name of a vector, or a model. Tokens of the base must keep their ids.
    """
    vocabulary: Vocabulary = Field(default="base", examples=["union"])
    """Tokens that the merge has. base: those of the base; a vector with others is refused. union:
    those of all vectors, too, such as <|im_start|> of a chat model. Rows of embedding and head are
    then matched by token, and one that the base lacks comes from the vectors that have it. The base
    with these tokens is kept in the cache, which takes as much disk as the base.
    """
    objective: Objective = Field(
        examples=[{"terms": [{"task": "gsm8k", "metric": "exact_match,flexible-extract"}]}]
    )
    """What the search maximizes."""
    test: Objective | None = Field(default=None, examples=[{"terms": [{"text": "sealed.jsonl"}]}])
    """Sealed test: items that the search never sees, on which `optimer compare` scores the merge
    and every baseline.
    """
    retarget: dict[str, dict[str, Share]] = Field(
        default={}, examples=[{"code only": {"code": 1.0}}], json_schema_extra={"unit": "weight"}
    )
    """Other objectives, each as {term: weight} over the recorded terms. They are answered from the
    same trials, without a search of their own, and each adds a row to `optimer compare`.
    """
    search: SearchConfig = Field(default=SearchConfig(), examples=[{"n_trials": 100}])
    """How many trials to run and how to choose them."""
    baselines: Baselines = Field(
        default=Baselines(), examples=[{"merge_methods": ["ties"], "random_vectors": True}]
    )
    """What to compare the merge with."""

    def idle_fields(self) -> Iterator[Mistake]:
        terms = self.objective.scored_terms
        for term in terms if self.search.rescore_top == 0 else ():
            if term.rescore_only:
                group: str = "terms" if term in self.objective.terms else "constraints"
                index = getattr(self.objective, group).index(term)
                place = ("objective", group, index, "rescore_only")
                message = "the term is never scored where search.rescore_top is 0"
                yield place, f"{message}; leave it out, or raise that"
        for index, term in enumerate(self.test.terms if self.test is not None else ()):
            if term.rescore_only:
                message = "does nothing in a sealed test, which scores every term; leave it out"
                yield ("test", "terms", index, "rescore_only"), message
        terms = [*terms, *(self.test.scored_terms if self.test is not None else ())]
        if all(term.task is None for term in terms):
            for name, value in self.objective.prompting.items():
                if value:
                    yield ("objective", name), "does nothing without a 'task'; leave it out"

    def rescore_limit_of(self, term: Term) -> int | None:
        """Return how many items of a term are re-scored (None: all), never fewer than the search
        scored.
        """
        if term.rescore_only and term.limit is not None:
            return term.limit
        limits = [self.search.rescore_limit]
        limits += [] if term.rescore_only else [self.objective.limit_of(term)]
        return None if None in limits else max(limit for limit in limits if limit is not None)

    def keeps_search_scores(self, term: Term, n_items: int | None) -> bool:
        """Whether re-scoring keeps the search's scores of a term, because it would score the same
        items. `n_items` is how many items the search scored, None if that is not known.
        """
        if term.rescore_only:
            return False
        limit = self.objective.limit_of(term)
        has_seen_all = n_items is not None and limit is not None and n_items < limit
        return has_seen_all or limit == self.rescore_limit_of(term)

    def mistakes(self) -> Iterator[Mistake]:
        for name in self.vectors:
            if not name.isprintable() or not 0 < len(name.strip()) <= LONGEST_NAME:
                message = f"found {name[:80]!r}. Expected a name of visible characters"
                yield ("vectors", name), message
        for name in self.vectors:
            if re.fullmatch(r"[^./][^/]*", name) is None:  # directories get this name
                yield (
                    ("vectors", name),
                    f"found the name {name!r}. Expected one without '/' that does not begin with "
                    "'.'",
                )
        yield from self._mistakes_of_names()
        if not self.free:
            yield ("vectors",), "every vector is fixed, so there is nothing to search; free one"
            return
        yield from self._mistakes_of_mixtures()
        yield from self._mistakes_of_placement()
        yield from self._mistakes_of_search()
        yield from self._mistakes_of_test()
        yield from self._mistakes_of_retarget()
        yield from self._mistakes_of_baselines()

    def _mistakes_of_names(self) -> Iterator[Mistake]:
        """Yield vectors whose names could be those of groups, and too many groups."""
        for name, message in confusable_names(self.groups, self.vectors):
            yield ("vectors", name), message
        if len(self.weight_names) > MOST_VECTORS:
            message = f"{len(self.weight_names)} weights with all groups; at most {MOST_VECTORS}"
            yield ("vectors",), message

    def _mistakes_of_mixtures(self) -> Iterator[Mistake]:
        for name, vector in self.vectors.items():
            for part, message in self._unknown_parts(vector.mixture):
                yield ("vectors", name, "mixture", part), message

    def _unknown_parts(self, shares: Shares | None) -> Iterator[tuple[str, str]]:
        """Yield the parts of a mixture that are no vectors with text of their own, each with what
        is wrong.
        """
        singles = sorted(name for name, vector in self.vectors.items() if vector.mixture is None)
        for part in shares if isinstance(shares, dict) else ():
            if part in self.vectors and part not in singles:
                yield part, f"{part!r} is a mixture itself; give the shares of what is in it"
            elif part not in singles:
                yield part, f"no vector is called {part!r}; vectors: {singles}"

    def _mistakes_of_placement(self) -> Iterator[Mistake]:
        if self.device_map is not None and self.engine.name != "transformers":
            message = "it spreads a model of transformers; with engine: vllm, give its options"
            yield ("device_map",), f"{message} tensor_parallel_size or cpu_offload_gb instead"
        named = self.device_map.items() if isinstance(self.device_map, dict) else ()
        for module, device in named:
            if DEVICES.fullmatch(str(device)) is None:
                message = f"found {quote(device)}; expected the number of a GPU, 'cpu' or 'disk'"
                yield ("device_map", module), message
        for key, amount in (self.max_memory or {}).items():
            device = str(key)
            if DEVICES.fullmatch(device) is None or device == "disk":
                message = f"found device {quote(key)}; expected the number of a GPU, or 'cpu'"
                yield ("max_memory", device), message
            if AMOUNT.fullmatch(amount) is None:
                message = f"found {quote(amount)}; expected an amount like 60GiB"
                yield ("max_memory", device), message
        if self.max_memory is not None and self.device_map is None:
            yield ("max_memory",), "it needs a device_map; add `device_map: auto`"

    def _mistakes_of_test(self) -> Iterator[Mistake]:
        if self.test is None:
            return
        searched = [(term.task_name, *term.hash_range) for term in self.objective.scored_terms]
        for term in self.test.scored_terms:
            group: list[Any] = self.test.terms if term in self.test.terms else self.test.constraints
            where = ("test", "terms" if group is self.test.terms else "constraints")
            place, shared = (*where, group.index(term)), term.task or term.text or term.function
            low, high = term.hash_range
            if any(name == term.task_name and low < b and a < high for name, a, b in searched):
                yield (
                    place,
                    f"objective and test share '{shared}': the sealed items would be ones the "
                    "search saw. Give the test its own file, or the two parts of the items: "
                    "hash_range [0, 0.5] and [0.5, 1]",
                )
        split = split_of([self.objective])
        if self.objective.splits_items and self.test.splits_items and split != self.test.split_by:
            yield ("test", "split_by"), f"found {self.test.split_by!r}; the objective has {split!r}"
        if self.objective.prompting != self.test.prompting:
            yield (
                ("test",),
                "objective and test must have the same apply_chat_template, fewshot_as_multiturn "
                "and system_instruction",
            )

    def _mistakes_of_retarget(self) -> Iterator[Mistake]:
        recorded = {term.label for term in self.objective.terms_at("search")}
        tested = {term.label for term in self.test.terms} if self.test is not None else recorded
        for name, weights in self.retarget.items():
            if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
                yield ("retarget", name), "weights must be >= 0, and one > 0"
            for label in weights:
                if label not in recorded:
                    message = f"no term {label!r} is recorded; terms: {', '.join(sorted(recorded))}"
                    yield ("retarget", name, label), message
                elif label not in tested:
                    message = f"the test has no term {label!r} to measure it on"
                    yield ("retarget", name, label), message

    def with_other_search(self, settings: SearchBaseline) -> "StudyConfig":
        """Return the study with other search settings, and without its test and its baselines."""
        objective = self.objective.model_dump()
        if settings.limit is not None:
            objective["limit"] = settings.limit
            for term in (*objective["terms"], *objective["constraints"]):
                term["limit"] = None
        search = settings.model_dump(exclude={"limit", "without"})
        search["total"] = search["total"] or self.search.total
        own = self.model_dump(exclude={"test", "retarget", "baselines"})
        for name in settings.without:
            vector = own["vectors"][name]
            for weight in (vector.get("by") or {"": vector}).values():
                weight["fixed"] = 0.0
        return StudyConfig.model_validate(own | {"objective": objective, "search": search})

    def with_scale_search(self, sources: Mapping[str, str], scaled: str) -> "StudyConfig":
        """Return the study of the scale of one model, `scaled`, beside the fixed vectors: name ->
        reference. Its trials score the items of this study.
        """
        vectors = {
            name: {"source": source}
            if name == scaled
            else self.vectors[name].model_dump(include={"fixed", "by"}) | {"source": source}
            for name, source in sources.items()
        }
        own = self.model_dump(exclude={"test", "retarget", "baselines", "vectors"})
        changes = {"n_trials": SCALE_TRIALS, "surrogate": "per_term", "pareto": False}
        search = own["search"] | changes | {"total": None, "screen": None, "report_to": []}
        own |= {"vectors": vectors, "search": search}
        return StudyConfig.model_validate(own | {"tokenizer_source": self.tokenizer_reference})

    def with_attempts(self, sources: Mapping[str, str]) -> "StudyConfig":
        """Return the study that scores models beside the fixed vectors: name -> reference. It has
        a trial for the base and one for each model, on as many items as the best trials are scored
        on in the end.
        """
        objective = self.objective.model_dump()
        if self.search.rescore_top:
            objective["limit"] = None
            for group in ("terms", "constraints"):
                for term, data in zip(
                    getattr(self.objective, group), objective[group], strict=True
                ):
                    data |= {"limit": self.rescore_limit_of(term), "rescore_only": False}
        vectors = {name: {"source": source} for name, source in sources.items()}
        vectors |= {name: self.vectors[name].model_dump() for name in self.fixed_parts}
        search = {"n_trials": len(sources) + 1, "surrogate": "random", "rescore_top": 0}
        own = self.model_dump(exclude={"test", "retarget", "baselines"})
        own |= {"objective": objective, "vectors": vectors, "search": search}
        return StudyConfig.model_validate(own | {"tokenizer_source": self.tokenizer_reference})

    def _mistakes_of_baselines(self) -> Iterator[Mistake]:
        for name, settings in self.baselines.searches.items():
            at = ("baselines", "searches", name)
            searched = self.free_parts
            for each in (each for each in settings.without if each not in searched):
                message = f"no searched vector is called {each!r}; searched: {list(searched)}"
                yield (*at, "without"), message
            if not searched.keys() - set(settings.without):
                yield (*at, "without"), "it leaves nothing to search; leave one vector in"
                continue
            for where, message in self._mistakes_of_search(settings):
                yield (*at, *where[1:]), message
        attempts = self.baselines.attempts
        for number in sorted({each for each in attempts if attempts.count(each) > 1}):
            yield ("baselines", "attempts"), f"found {number} twice; give each number once"
        names: set[str] = set()
        for group in ("weights", "plugins", "searches", "models", "mixtures"):
            for name in getattr(self.baselines, group):
                if name in names:
                    message = f"two are called {name!r}; give each its own name"
                    yield ("baselines", group, name), message
                names.add(name)
        yield from self._mistakes_of_guesses()
        for name, mixture in self.baselines.mixtures.items():
            if mixture.shares == "searched" and self.groups:
                message = "found 'searched', but a vector with groups ('by') has no one weight"
                yield ("baselines", "mixtures", name, "shares"), f"{message}; give the shares"
            for vector, message in self._unknown_parts(mixture.shares):
                yield ("baselines", "mixtures", name, "shares", vector), message

    def _mistakes_of_guesses(self) -> Iterator[Mistake]:
        known = [*self.free_parts, *(name for name in self.weight_names if name in self.free)]
        fixed = self.fixed
        for row, given in self.baselines.weights.items():
            for name, weight in given.items():
                at = ("baselines", "weights", row, name)
                if name in known or fixed.get(name) == weight:
                    continue
                if name in fixed or name in self.vectors:
                    yield at, f"{name!r} is fixed, so every row has it as it is; leave it out"
                else:
                    hint = did_you_mean(name, list(dict.fromkeys(known)))
                    yield at, f"no vector is called {name!r}.{hint}"

    def fill_weights(self, given: Mapping[str, float]) -> dict[str, float]:
        """Return all weights of a merge, of which `given` has some: by name, or of all searched
        groups of a vector by its name. The other searched ones are 0.
        """
        parts = {name: own for name, own in self.free_parts.items() if name in given}
        whole = {weight: given[name] for name, own in parts.items() for weight in own}
        own = {name: weight for name, weight in given.items() if name in self.free}
        return dict.fromkeys(self.free, 0.0) | whole | own | self.fixed

    def _mistakes_of_search(self, other: SearchConfig | None = None) -> Iterator[Mistake]:
        """Yield what is wrong with the search, or with `other` settings over the same objective."""
        search = other or self.search
        total = search.total or self.search.total
        counting = [term for term in self.objective.terms_at("search") if term.weight > 0]
        if search.pareto and (len(counting) < 2 or self.objective.combine == "worst"):
            yield (
                ("search", "pareto"),
                "a front needs two terms with a weight above 0, and another combine than 'worst'",
            )
        if search.surrogate not in ("per_term", "random") and (
            total is not None or self.objective.constraints or search.pareto
        ):
            yield (
                ("search", "surrogate"),
                f"{search.surrogate!r} supports no total, constraints or pareto; use per_term",
            )
        if search.gradients == "always" and (reason := self._why_no_gradients(search)):
            yield ("search", "gradients"), f"found 'always', but {reason}"
        if search.screen is not None and (reason := self._why_no_gradients(search)):
            yield ("search", "screen"), f"it needs gradients, but {reason}"
        for name, (low, high) in self.free.items() if search.screen is not None else ():
            if not low <= 0 <= high:
                yield (
                    ("search", "screen"),
                    f"vectors that it leaves out stay at 0, but the bounds of {name!r} are "
                    f"[{low:g}, {high:g}]; let them include 0, or leave screen out",
                )
        without = other.without if isinstance(other, SearchBaseline) else []
        if total is not None and (other is None or other.total is not None or without):
            left_out = [part for name in without for part in self.free_parts.get(name, [])]
            bounds = [each for name, each in self.free.items() if name not in left_out]
            lows, highs = zip(*bounds, strict=True)
            low, high = total
            if min(lows) < 0 or not max(sum(lows), 0) <= low < high or low > sum(highs):
                yield (
                    ("search", "total"),
                    f"{list(total)} cannot be met; give [low, high] with 0 <= low < high, within "
                    "the sums that the bounds (none below 0) allow",
                )

    def _why_no_gradients(self, search: SearchConfig) -> str | None:
        """Return why a search cannot use gradients, and what to change; None if it can."""
        if self.engine.name != "transformers":
            return f"engine {self.engine.name} has no gradients; use transformers, or never"
        if search.sampler is not None:
            return f"sampler {search.sampler} does not use gradients; use never"
        if self.device_map is not None:
            return "a model that device_map spreads has no gradients; leave it out, or give never"
        if search.surrogate != "per_term":
            return f"surrogate {search.surrogate} does not use gradients; use per_term, or never"
        return None

    @property
    def can_use_gradients(self) -> bool:
        """Whether engine and surrogate can take and use gradients."""
        return self._why_no_gradients(self.search) is None

    @property
    def identity(self) -> dict[str, Any]:
        """What all trials of a study have in common; it must not change while a study goes on."""
        outside = {"retarget", "baselines", "device_map", "max_memory"}
        data = self.model_dump(mode="json", exclude=outside)
        for name in ("n_trials", "report_to", "gradients", "screen"):
            data["search"].pop(name, None)
        for name in ("tokenizer_source", "engine", "vocabulary"):  # newer than some studies
            if getattr(self, name) == type(self).model_fields[name].default:
                del data[name]
        for name in ("objective", "test"):
            if data[name] is not None and data[name].get("split_by") == "prompt":
                del data[name]["split_by"]
        return data

    @classmethod
    def read_record(cls, path: AnyPath) -> Self:
        """Read the study.json of a study directory. If it says nothing about `split_by`, it is from
        before that field, when items were split by prompt.
        """
        data = read_yaml(Path(path))
        for part in ("objective", "test"):
            if isinstance(data.get(part), dict):
                data[part].setdefault("split_by", "prompt")
        return parse(cls, data, Path(path))

    def with_split_of(self, recorded: Self) -> Self:
        """Return the study with the `split_by` of its own record where this does not name one."""
        parts = {}
        for name in ("objective", "test"):
            ours, theirs = getattr(self, name), getattr(recorded, name)
            if ours is not None and theirs is not None and "split_by" not in ours.model_fields_set:
                parts[name] = ours.model_copy(update={"split_by": theirs.split_by})
        return self.model_copy(update=parts)

    def digest(self) -> str:
        """Return a digest of the identity, which names the study in recipes."""
        return digest(self.identity)

    @property
    def tokenizer_reference(self) -> str | None:
        """The model whose tokenizer the merge takes; None: the base."""
        sources = {name: vector.source for name, vector in self.vectors.items()}
        return tokenizer_reference(self.tokenizer_source, sources)

    @property
    def sources(self) -> dict[str, str]:
        """Where the vectors are, by name."""
        return {name: str(vector.source) for name, vector in self.vectors.items()}

    @property
    def mixtures(self) -> dict[str, Mapping[str, float]]:
        """The shares of each vector that is trained on the text of others, by name; none while
        `optimer run` still has to work out uniform shares.
        """
        return {
            name: vector.mixture if isinstance(vector.mixture, dict) else {}
            for name, vector in self.vectors.items()
            if vector.mixture is not None
        }

    @property
    def groups(self) -> dict[str, Groups]:
        """How the vectors that have several weights are split, by vector."""
        named = self.vectors.items()
        return {name: vector.groups for name, vector in named if vector.groups is not None}

    @property
    def _weights(self) -> dict[str, Range]:
        """Bounds and fixed value of every weight of the merge, by name."""
        return {
            weight: own
            for name, vector in self.vectors.items()
            for weight, own in vector.weights_of(name).items()
        }

    @property
    def weight_names(self) -> list[str]:
        """The names of all weights, searched or fixed: `math` or, of groups, `math.mlp`."""
        return list(self._weights)

    @property
    def free(self) -> dict[str, tuple[float, float]]:
        """Bounds of the weights that are searched."""
        return {name: bounds for name, (bounds, fixed) in self._weights.items() if fixed is None}

    @property
    def fixed(self) -> dict[str, float]:
        """The weights that are the same in every merge."""
        return {name: fixed for name, (_, fixed) in self._weights.items() if fixed is not None}

    @property
    def free_parts(self) -> dict[str, list[str]]:
        """The searched weights of each vector that has any, by vector: its own, or those of its
        groups.
        """
        free = self.free
        parts = {
            name: [weight for weight in vector.weights_of(name) if weight in free]
            for name, vector in self.vectors.items()
        }
        return {name: own for name, own in parts.items() if own}

    @property
    def fixed_parts(self) -> dict[str, dict[str, float]]:
        """The weights of each vector of which nothing is searched, by vector: every merge and every
        baseline has them.
        """
        searched, fixed = self.free_parts, self.fixed
        return {
            name: {weight: fixed[weight] for weight in vector.weights_of(name)}
            for name, vector in self.vectors.items()
            if name not in searched
        }

    @property
    def free_singles(self) -> list[str]:
        """The searched vectors that have text of their own, so no mixtures."""
        return [name for name in self.free_parts if self.vectors[name].mixture is None]
