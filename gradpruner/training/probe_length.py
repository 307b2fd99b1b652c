"""Refuse a probe that ends before its adapters show a gradient."""

from __future__ import annotations

from collections.abc import Iterator

from gradpruner.errors import InvalidArgument
from gradpruner.training.recipe import Recipe


def check_probe_length(recipe: Recipe, steps: int, of_steps: int) -> None:
    """Check that a probe of new adapters can see a gradient.

    New adapters have no gradient G = gB gA before a step with a learning rate above 0, because their B is 0. In a
    warm-up, the learning rate of the first step is 0.

    Args:
        recipe: how the probe trains.
        steps: optimizer steps of the probe.
        of_steps: steps of the whole run, which decide the learning rate.

    Raises:
        InvalidArgument: every step of the probe is too early.
    """
    if not recipe.rank:
        return  # weights that train themselves have a gradient from the first step on
    first = next((step for step, rate in enumerate(_rates(recipe, of_steps), start=1) if rate > 0), None)
    if first is None:
        raise InvalidArgument(
            f"warmup = {recipe.warmup:g}: the learning rate is 0 in all {of_steps} steps; expected a shorter warm-up, "
            "or another schedule"
        )
    if steps <= first:
        needed = f"{first + 1} steps or more (probe_steps; steps of the command probe)"
        raise InvalidArgument(
            f"a probe of {steps} steps with warmup = {recipe.warmup:g}: the learning rate is first above 0 in step "
            f"{first}, and new adapters show a gradient only afterwards; expected {needed}"
            f"{', or warmup = 0' if recipe.warmup and steps > 1 else ''}"
        )


def _rates(recipe: Recipe, of_steps: int) -> Iterator[float]:
    """Return the learning rate of each step, as a share of the highest."""
    import torch
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = recipe.trainer_arguments
    schedule = get_scheduler(
        arguments.get("lr_scheduler_type", "linear"),
        optimizer,
        num_warmup_steps=recipe.warmup_steps(of_steps),
        num_training_steps=of_steps,
        scheduler_specific_kwargs=arguments.get("lr_scheduler_kwargs"),
    )
    for _ in range(of_steps):
        yield schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
