"""What `optimer run` and `optimer plan` do: one run of a recipe folder, or one for each seed.

Mistakes in the files of the folder are named before anything is imported that takes seconds.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from optimer_hf.errors import ConfigError
from optimer_hf.experiment.checking import list_missing_inputs
from optimer_hf.experiment.folder import Run, check_folder, load_inputs, run_of
from optimer_hf.models.devices import parse_devices

if TYPE_CHECKING:
    from optimer_hf.experiment.hardware_plan import HardwarePlan
    from optimer_hf.experiment.plan_file import Plan
    from optimer_hf.study.config import StudyConfig

logger = logging.getLogger(__name__)


def run_folder(
    recipe_dir: Path,
    out: Path | None = None,
    *,
    short: bool = False,
    profile: str | None = None,
    tokens: str | int | None = None,
    n_seeds: int | None = None,
    seed: int | None = None,
) -> tuple[Run, str]:
    """Run a recipe folder, under `n_seeds` seeds or as the one with this `seed` if that is given,
    and return the run with its summary. If the run is finished, only read the summary. The other
    arguments are those of `run_of`.

    Raises ConfigError for `n_seeds` and `seed` together.
    """
    if n_seeds is not None and seed is not None:
        raise ConfigError(
            f"--seeds {n_seeds}, --seed {seed}: expected one of them. --seed {seed} runs that one "
            "alone, --seeds runs those that are missing and joins all."
        )
    run = run_of(
        recipe_dir,
        out,
        short=short,
        profile=profile,
        tokens=tokens,
        is_seeded=n_seeds is not None or seed is not None,
    )
    check_folder(run)
    from optimer_hf.experiment.run import finished_summary, run_recipe
    from optimer_hf.experiment.seeds import mark_seeds, run_seeds

    if n_seeds is not None:
        return run, run_seeds(run, n_seeds)
    if seed is not None:
        run = mark_seeds(run, seed)
    summary = finished_summary(run)
    if summary is None:
        return run, run_recipe(run)
    logger.info("finished already, nothing to do")
    return run, summary


def plan_source(
    source: Path,
    out: Path | None = None,
    *,
    short: bool = False,
    profile: str | None = None,
    tokens: str | int | None = None,
    n_seeds: int | None = None,
    fetch: bool = False,
) -> "Plan":
    """Return the plan of a recipe folder, which `out` keeps, or of a study.yaml.

    The base has to be on this disk unless `fetch` allows downloading it. With `n_seeds`, the plan
    is that of the first seed. Raises ConfigError for options that do not go with the source.
    """
    if source.is_dir():
        run = run_of(
            source,
            out,
            short=short,
            profile=profile,
            tokens=tokens,
            is_seeded=n_seeds is not None,
        )
        check_folder(run)
        from optimer_hf.experiment.run import plan_run
        from optimer_hf.experiment.seeds import claim_seeds

        _check_base(load_inputs(run).study, fetch)
        if n_seeds is None:
            return plan_run(run)
        with claim_seeds(run, n_seeds) as runs:
            return plan_run(runs[0])
    if out is not None or short or profile or tokens or n_seeds:
        options = "OUT, --short, --profile, --tokens and --seeds"
        raise ConfigError(f"{source}: {options} go with a recipe folder.")
    from optimer_hf.study.config import StudyConfig

    config = StudyConfig.read(source)
    if missing := list_missing_inputs(source, config, baselines=False):
        raise ConfigError(missing)
    from optimer_hf.experiment.planning import make_plan

    _check_base(config, fetch)
    return make_plan(config, {}, Path.cwd(), is_run=False)


def plan_elsewhere(
    source: Path,
    devices: str,
    *,
    utilisation: float,
    short: bool = False,
    profile: str | None = None,
    tokens: str | int | None = None,
) -> "HardwarePlan":
    """Return the plan of a recipe folder or a study.yaml on devices such as `8xH100`, of whose peak
    a share is reached. Neither they nor the weights of the base have to be here.

    Raises ConfigError for an unknown device and for options that do not go with the source.
    """
    n_devices, device = parse_devices(devices)
    if source.is_dir():
        run = run_of(source, short=short, profile=profile, tokens=tokens)
        check_folder(run)
        inputs = load_inputs(run)
        config, trainings = inputs.study, inputs.trainings
    else:
        if short or profile or tokens:
            options = "--short, --profile and --tokens"
            raise ConfigError(f"{source}: {options} go with a recipe folder.")
        from optimer_hf.study.config import StudyConfig

        config, trainings = StudyConfig.read(source), {}
    from optimer_hf.experiment.hardware import Hardware
    from optimer_hf.experiment.hardware_planning import plan_for_hardware

    hardware = Hardware(n_devices, device, utilisation)
    return plan_for_hardware(config, trainings, hardware, is_run=source.is_dir())


def _check_base(config: "StudyConfig", fetch: bool) -> None:
    """Log what has to be downloaded; raise ConfigError if that includes the base, which the probe
    needs, unless `fetch` allows it.
    """
    from optimer_hf.experiment.plan_file import describe_download
    from optimer_hf.experiment.planning import list_downloads

    missing = list_downloads(config)
    for each in missing:
        logger.info("%s", describe_download(each))
    if not fetch and any(each.reference == config.base_model for each in missing):
        raise ConfigError(
            f"{config.base_model}: is not on this disk, and the probe needs it. Add --fetch."
        )
