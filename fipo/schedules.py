"""What changes in the course of a run: pure functions of the config and the step, in shares of the run's steps.

A step is counted from 0. Nothing here is state: a resumed run is at the same place of every schedule.
"""

from fipo.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last steps before the last phase; in it once more to 0."""
    steps, schedule, first = config.workload.steps, config.optimiser, first_decoder_only(config)
    rising = _rising(config, step, schedule.warmup)
    falling = (first - step) / max(1.0, schedule.decay * steps)
    if config.levels is not None and step >= first < steps:
        falling = config.levels.settling_rate * (steps - step) / (steps - first)
    return config.workload.learning_rate * min(rising, falling)


def active_latents(config: RunConfig, step: int) -> int:
    """K of topk and batchtopk: falls linearly from `k_start` times the workload's k to k, at most F."""
    schedule, workload = config.optimiser, config.workload
    left = max(0.0, 1 - (step + 1) / max(1.0, schedule.k_fall * workload.steps))
    return min(workload.latents, round(workload.k * (1 + (schedule.k_start - 1) * left)))


def penalty_share(config: RunConfig, step: int) -> float:
    """Share of λ_s and λ_o that is in force: rises from 0 to 1 over the penalty warm-up."""
    return _rising(config, step, config.optimiser.penalty_warmup)


def order_share(config: RunConfig, step: int) -> float:
    """Way of the levels' power from `short_power` to 1: rises from 0 to 1 over their `rise`; 0 without levels."""
    return 0.0 if config.levels is None else _rising(config, step, config.levels.rise)


def stop_gradient(config: RunConfig, step: int) -> float:
    """s of the levels: rises from 0 to its full strength between the two shares of `held`; 0 without levels."""
    levels = config.levels
    if levels is None:
        return 0.0
    first, last = levels.held
    return levels.stop_gradient * _rising(config, step, last, first)


def first_decoder_only(config: RunConfig) -> int:
    """The first step of the last phase, in which the decoder alone learns; without one, the number of steps."""
    share = 0.0 if config.levels is None else config.levels.decoder_only
    return round((1 - share) * config.workload.steps)


def rescaling(config: RunConfig, step: int) -> float:
    """By what all codes are multiplied between the step before and this one (METHOD 4d): by less than 1 where the last
    phase begins, by 1 elsewhere."""
    levels, begins = config.levels, 0 < step == first_decoder_only(config) < config.workload.steps
    return 1 - levels.shrink if levels is not None and begins else 1.0


def _rising(config: RunConfig, step: int, last: float, first: float = 0.0) -> float:
    """From 0 to 1 between two shares of the steps; 1 from the first step on where both are 0."""
    steps = config.workload.steps
    return min(1.0, max(0.0, step + 1 - first * steps) / max(1.0, (last - first) * steps))
