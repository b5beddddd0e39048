"""tracking.py: trials in the tools that the HF Trainer reports to."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from optimer_hf.errors import ConfigError
from optimer_hf.searching import tracking
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import FunctionPool, config_of


def test_every_trial_is_in_tensorboard(tmp_path):
    config = config_of(search={"n_trials": 8, "rescore_top": 0, "report_to": ["tensorboard"]})
    study = search(config, tmp_path / "study", runner=InProcess(FunctionPool))
    (run,) = (tmp_path / "study" / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/objective", "train/best", "train/weight/w", "train/score/t"} <= tags
    shown = {event.step: event.value for event in events.Scalars("train/objective")}
    assert shown == pytest.approx({t.number: study.value(t) for t in study.trials})
    best = [event.value for event in events.Scalars("train/best")]
    assert best == sorted(best) and best[-1] == pytest.approx(max(shown.values()))


def test_where_trials_are_shown_is_no_part_of_the_study(tmp_path):
    quiet = config_of(search={"n_trials": 6, "rescore_top": 0})
    search(quiet, tmp_path / "study", runner=InProcess(FunctionPool))
    shown = {"n_trials": 8, "rescore_top": 0, "report_to": ["tensorboard"]}
    study = search(config_of(search=shown), tmp_path / "study", runner=InProcess(FunctionPool))
    assert len(study.trials) == 8 and config_of(search=shown).digest() == quiet.digest()


def test_a_tool_that_is_not_installed_is_named_before_the_first_trial(tmp_path):
    config = config_of(search={"n_trials": 8, "report_to": ["flyte"]})
    with pytest.raises(ConfigError, match=r"search\.report_to: FlyteCallback requires flytekit"):
        search(
            config,
            tmp_path / "study",
            runner=InProcess(lambda _: pytest.fail("a model was loaded")),
        )


class FailingTool:
    """A callback of the Trainer that fails at one event."""

    def __init__(self, event: str) -> None:
        self._event, self.events = event, []

    def __getattr__(self, event: str):
        def call(*_, **__) -> None:
            self.events.append(event)
            if event == self._event:
                raise OSError("no network")

        return call


@pytest.mark.parametrize("event", ["on_log", "on_train_end"])
def test_a_tool_that_fails_ends_no_search(event, tmp_path, monkeypatch, caplog):
    tool = FailingTool(event)
    monkeypatch.setattr(tracking, "make_callbacks", lambda _: [tool])
    config = config_of(search={"n_trials": 6, "rescore_top": 0, "report_to": ["wandb"]})
    assert search(config, tmp_path / "s", runner=InProcess(FunctionPool)).is_finished
    assert tool.events == ["on_train_begin", *["on_log"] * 6, "on_train_end"]
    assert "search.report_to: FailingTool did not take " in caplog.text


def test_a_tool_that_refuses_to_begin_is_named_before_the_first_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "make_callbacks", lambda _: [FailingTool("on_train_begin")])
    config = config_of(search={"n_trials": 6, "report_to": ["wandb"]})
    with pytest.raises(ConfigError, match=r"search\.report_to: FailingTool: OSError: no network"):
        search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    assert not (tmp_path / "s").exists()


def test_tools_that_began_before_one_refused_are_ended(tmp_path, monkeypatch):
    tools = [FailingTool(event) for event in ("on_train_end", "", "on_train_begin", "")]
    monkeypatch.setattr(tracking, "make_callbacks", lambda _: tools)
    config = config_of(search={"n_trials": 6, "report_to": ["wandb"]})
    with pytest.raises(ConfigError, match=r"FailingTool: OSError: no network"):
        search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    both = ["on_train_begin", "on_train_end"]
    assert [tool.events for tool in tools] == [both, both, ["on_train_begin"], []]
