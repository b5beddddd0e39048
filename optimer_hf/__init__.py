"""Search the weights of `base + sum_i w_i v_i` after training, instead of fixing a data mixture
before it.

    import optimer_hf as optimer

    study = optimer.search("study.yaml", "my-study")
    recipe = optimer.write_recipe(study, "recipe.yaml")
    optimer.build(recipe, "merged")

The names here are the public interface; everything else may change. A name is imported when it is
first used, so importing the package takes no time. Paths are texts or path objects. Models are
directories, Hub ids or ResolvedModels.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimer_hf.api import build as build
    from optimer_hf.api import compare as compare
    from optimer_hf.api import evaluate as evaluate
    from optimer_hf.api import extract as extract
    from optimer_hf.api import load_study as load_study
    from optimer_hf.api import merge as merge
    from optimer_hf.api import open_vector as open_vector
    from optimer_hf.api import plot as plot
    from optimer_hf.api import predict as predict
    from optimer_hf.api import run as run
    from optimer_hf.api import search as search
    from optimer_hf.api import train as train
    from optimer_hf.api import verify as verify
    from optimer_hf.api import write_recipe as write_recipe
    from optimer_hf.api import write_report as write_report
    from optimer_hf.comparison.result import Comparison as Comparison
    from optimer_hf.errors import ConfigError as ConfigError
    from optimer_hf.errors import CorpusError as CorpusError
    from optimer_hf.errors import EvaluationError as EvaluationError
    from optimer_hf.errors import HubError as HubError
    from optimer_hf.errors import ModelError as ModelError
    from optimer_hf.errors import OptimerError as OptimerError
    from optimer_hf.errors import OutputError as OutputError
    from optimer_hf.errors import StudyError as StudyError
    from optimer_hf.errors import VocabularyError as VocabularyError
    from optimer_hf.hub.pulling import pull as pull
    from optimer_hf.hub.pushing import push as push
    from optimer_hf.merging.resident import ResidentModel as ResidentModel
    from optimer_hf.models.layout import ResolvedModel as ResolvedModel
    from optimer_hf.recipes.record import Recipe as Recipe
    from optimer_hf.scoring.objective import Objective as Objective
    from optimer_hf.scoring.objective import Term as Term
    from optimer_hf.scoring.scores import TermScore as TermScore
    from optimer_hf.study.config import StudyConfig as StudyConfig
    from optimer_hf.study.directory import Study as Study
    from optimer_hf.study.plugins import Request as Request
    from optimer_hf.study.trials import Trial as Trial
    from optimer_hf.training.config import TrainConfig as TrainConfig
    from optimer_hf.vectors.vector import DistributionVector as DistributionVector

__version__ = version("optimer-hf")

_HOMES = {
    "api": [
        "build",
        "compare",
        "evaluate",
        "extract",
        "load_study",
        "merge",
        "open_vector",
        "plot",
        "predict",
        "run",
        "search",
        "train",
        "verify",
        "write_recipe",
        "write_report",
    ],
    "comparison.result": ["Comparison"],
    "errors": [
        "ConfigError",
        "CorpusError",
        "EvaluationError",
        "HubError",
        "ModelError",
        "OptimerError",
        "OutputError",
        "StudyError",
        "VocabularyError",
    ],
    "hub.pulling": ["pull"],
    "hub.pushing": ["push"],
    "merging.resident": ["ResidentModel"],
    "models.layout": ["ResolvedModel"],
    "recipes.record": ["Recipe"],
    "scoring.objective": ["Objective", "Term"],
    "scoring.scores": ["TermScore"],
    "study.config": ["StudyConfig"],
    "study.directory": ["Study"],
    "study.plugins": ["Request"],
    "study.trials": ["Trial"],
    "training.config": ["TrainConfig"],
    "vectors.vector": ["DistributionVector"],
}
_MODULES = {name: f"optimer_hf.{module}" for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
