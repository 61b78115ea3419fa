"""Old names of keys and values, so that a recipe that has one is refused with the new name."""

RENAMED = {
    "algorithm.average_decay_growth": "algorithm.ema_decay_growth",
    "algorithm.average_decay_max": "algorithm.ema_decay_max",
    "algorithm.noisings": "algorithm.noised_samples",
    "algorithm.off_policy.behaviour_weight": "algorithm.off_policy.importance_weight",
    "composition": "aggregation",
    "composition.join": "aggregation.kind",
    "evaluation.average_decay": "evaluation.ema_decay",
    "evaluation.pictures": "evaluation.saved_images",
    "exhibits": "media",
    "exhibits.pictures": "media.images",
    "guard.scorer_fall": "guard.max_scorer_drop",
    "learner.ranks": "learner.world_size",
    "learner.shard_optimizer": "learner.shard_optimizer_state",
    "prompts.leave_out": "prompts.held_out_prompts",
    "reward.pictures_per_request": "reward.images_per_request",
    "reward_workers.max_set_aside": "reward_workers.max_dropped",
    "rollouts.pictures_every": "rollouts.images_every",
    "samplers.overdue_factor": "samplers.straggler_factor",
    "sampling.step_fraction": "sampling.timestep_fraction",
    "sampling.untrained_last_steps": "sampling.skip_last_steps",
    "sampling.window": "sampling.sde_window",
    "sampling.window_order": "sampling.sde_window_order",
    "sampling.window_rounds": "sampling.sde_window_rounds",
}
RENAMED_VALUES = {
    ("aggregation.kind", "normalised"): "z_score",
    ("algorithm.off_policy.ratio", "behaviour"): "behavior",
    ("guard.on_alarm", "go_on"): "continue",
}


def renamed_key(key: str, value: object) -> str | None:
    """Return a sentence that names the new key of an old one, and those of the keys in `value` if it is a table.

    If `key`, a dotted key, is no old name, return None.
    """
    if key not in RENAMED:
        return None
    inner = [f"{key}.{name}" for name in value if f"{key}.{name}" in RENAMED] if isinstance(value, dict) else []
    return "; ".join(f"{old} is called {RENAMED[old]} now" for old in (key, *inner))


def renamed_value(key: str, value: object) -> str | None:
    """Return a sentence that names the new value of an old one, or None if it is no old value."""
    new = RENAMED_VALUES.get((key, value)) if isinstance(value, str) else None
    return None if new is None else f"{key} is {value!r}: this value is called {new!r} now"
