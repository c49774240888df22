"""Learning-rate schedules as pure functions of the step, so that resuming needs nothing but the step."""

import math

from . import TrainError


def lr_factor(step: int, *, schedule: str, total: int, warmup: int = 0, decay_steps: float = 1,
              decay_rate: float = 1) -> float:
    """What the base learning rate is multiplied by at `step` (0-based) of `total`.

    Warm-up rises linearly over the first `warmup` steps. Then `cosine` falls to 0 at `total`, `exponential`
    is `decay_rate` to the number of whole `decay_steps` since step 0 (TF-slim's stairs), `constant` is 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, total - warmup))
    if schedule == "exponential":
        return decay_rate ** (step // decay_steps)
    if schedule == "constant":
        return 1.0
    raise TrainError(f"the schedule must be one of cosine, exponential, constant, got {schedule!r}")
