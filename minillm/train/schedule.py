"""Learning rate as a share of its peak: pure functions of the step."""

import math

from minillm.settings import OptimConfig


def lr_share(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """Return the multiplier for the update that follows `step` finished ones.

    `wsd`: linear warm-up, constant, linear decay to `min_lr_ratio` (Hu et al. 2024,
    arXiv:2404.06395; decay to zero: Bergsma et al. 2025, arXiv:2502.15938). `cosine`: linear
    warm-up, half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5).

    >>> [round(lr_share(s, 10, OptimConfig(warmup_ratio=0.2)), 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.2]
    """
    warmup = round(cfg.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if cfg.schedule == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        decay = max(1, min(round(cfg.decay_ratio * total_steps), total_steps - warmup))
        falling = min(1.0, max(0, total_steps - step) / decay)
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * falling
