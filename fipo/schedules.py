"""What changes in the course of a run: pure functions of the config and the step, in shares of the run's steps.

A step is counted from 0. Nothing here is state: a resumed run is at the same place of every schedule.
"""

from fipo.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last steps."""
    steps, schedule = config.workload.steps, config.optimiser
    rising = (step + 1) / max(1.0, schedule.warmup * steps)
    falling = (steps - step) / max(1.0, schedule.decay * steps)
    return config.workload.learning_rate * min(1.0, rising, falling)


def active_latents(config: RunConfig, step: int) -> int:
    """K of topk and batchtopk: falls linearly from `k_start` times the workload's k to k, at most F."""
    schedule, workload = config.optimiser, config.workload
    left = max(0.0, 1 - (step + 1) / max(1.0, schedule.k_fall * workload.steps))
    return min(workload.latents, round(workload.k * (1 + (schedule.k_start - 1) * left)))


def penalty_share(config: RunConfig, step: int) -> float:
    """Share of λ_s and λ_o that is in force: rises from 0 to 1 over the penalty warm-up."""
    return min(1.0, (step + 1) / max(1.0, config.optimiser.penalty_warmup * config.workload.steps))


def order_share(config: RunConfig, step: int) -> float:
    """Way of the levels' power from `short_power` to 1: rises from 0 to 1 over their `rise`; 0 without levels."""
    levels = config.levels
    return 0.0 if levels is None else min(1.0, (step + 1) / max(1.0, levels.rise * config.workload.steps))


def stop_gradient(config: RunConfig, step: int) -> float:
    """s of the levels: rises from 0 to its full strength between the two shares of `held`; 0 without levels."""
    levels, steps = config.levels, config.workload.steps
    if levels is None:
        return 0.0
    first, last = levels.held
    return levels.stop_gradient * min(1.0, max(0.0, step + 1 - first * steps) / max(1.0, (last - first) * steps))


def decoder_only(config: RunConfig, step: int) -> bool:
    """Is this step in the last phase, in which the decoder alone learns?"""
    levels = config.levels
    return levels is not None and step >= round((1 - levels.decoder_only) * config.workload.steps)
