"""Every error a person can cause, as one tree.

    OptimerError
      ConfigError       a YAML or JSON file that cannot be used as it is written
      CorpusError       training text that is missing, empty or too small
      ModelError        a base model or vector that cannot be read, or that does not fit
        VocabularyError a vector whose tokens differ from those of its base
      EvaluationError   a task, metric or score that cannot be used
      StudyError        a study directory that cannot be continued
      OutputError       a place that cannot be written to
      HubError          something that cannot be pushed or pulled, or a Hub that refuses

A message says where the error is, what was found, what was expected and how to fix it. The command
line prints an OptimerError as `error: ...` and exits with status 1. Any other exception is a bug
and shows its traceback.
"""


class OptimerError(Exception):
    """Base class of all errors that are not bugs in this package."""


class ConfigError(OptimerError):
    """A configuration file has an unknown, missing or impossible value."""


class CorpusError(OptimerError):
    """A corpus is missing, empty, malformed or too small."""


class ModelError(OptimerError):
    """A model or vector cannot be read, or does not fit the base model."""


class VocabularyError(ModelError):
    """The tokens of a vector differ from those of its base, so their rows do not correspond."""


class EvaluationError(OptimerError):
    """A task or metric does not exist, or a score is not a finite number."""


class StudyError(OptimerError):
    """A study directory belongs to another config, is damaged, or is in use."""


class OutputError(OptimerError):
    """An output directory holds files of others, or writing to the disk failed."""


class HubError(OptimerError):
    """Something may not be published or trusted, or the Hub refuses or cannot be reached."""
