"""Colocation: what a learner rank and the sampler that shares its GPU ask for together, and what cannot be shared."""

from ray_ddpo.common.recipe.tables import PLACES, LearnerTable, RoleTable, SamplersTable

LITTLE = 1e-9  # rounding error of a sum of fractions


def asked(table: RoleTable) -> dict[str, float]:
    """Return the resources that one actor asks for, by Ray's names."""
    resources = {"CPU": table.num_cpus, "GPU": table.num_gpus, **table.resources}
    if table.accelerator_type:
        resources[f"accelerator_type:{table.accelerator_type}"] = 0.001  # the amount that Ray uses
    return {name: float(amount) for name, amount in resources.items() if amount}


def pair_resources(learner: LearnerTable, samplers: SamplersTable) -> dict[str, float]:
    """Return the resources of a learner rank and its sampler together, by Ray's names."""
    one, other = asked(learner), asked(samplers)
    return {name: round(one.get(name, 0) + other.get(name, 0), PLACES) for name in one | other}


def refuse_unshareable(learner: LearnerTable, samplers: SamplersTable, max_policy_lag: int) -> None:
    """Check that learner ranks and samplers can share GPUs in turns, if the recipe wants that.

    Raises:
        ValueError: they cannot take turns, are not as many, or what they ask for is not one GPU.
    """
    if not learner.colocated:
        return
    if max_policy_lag:
        raise ValueError(
            f"learner.colocated is true and max_policy_lag {max_policy_lag}: a learner rank and its sampler take turns "
            "on one GPU, so no round can be sampled while another is learned from: set max_policy_lag = 0, or "
            "learner.colocated = false"
        )
    if learner.parts_per_round > 1:
        raise ValueError(
            f"learner.colocated is true and learner.parts_per_round {learner.parts_per_round}: a learner rank and its "
            "sampler take turns on one GPU, so no part can be learned from while later tasks are sampled: set "
            "learner.parts_per_round = 1, or learner.colocated = false"
        )
    if learner.world_size != samplers.count:
        raise ValueError(
            f"learner.colocated is true, learner.world_size {learner.world_size} and samplers.count {samplers.count}: "
            "each rank shares its GPU with one sampler, so set both to the number of GPUs"
        )
    if samplers.max is not None and samplers.max != samplers.count:
        raise ValueError(
            f"learner.colocated is true, samplers.count {samplers.count} and samplers.max {samplers.max}: ddpo scale "
            "adds no sampler to ranks that each share a GPU with one, so leave samplers.max out"
        )
    _refuse_shares(learner, samplers)


def _refuse_shares(learner: LearnerTable, samplers: SamplersTable) -> None:
    """Raise ValueError if rank and sampler do not ask for shares of one GPU, of one kind."""
    shares = (learner.num_gpus, samplers.num_gpus)
    if any(shares) and not (all(shares) and 0.5 < sum(shares) <= 1 + LITTLE):
        raise ValueError(
            f"learner.colocated is true, learner.num_gpus {shares[0]:g} and samplers.num_gpus {shares[1]:g}: they are "
            "shares of one GPU, so give both more than 0, and together more than 0.5 and at most 1, such as 0.5 each"
        )
    kinds = {learner.accelerator_type, samplers.accelerator_type} - {None}
    if len(kinds) > 1:
        raise ValueError(
            f"learner.colocated is true, learner.accelerator_type {learner.accelerator_type!r} and "
            f"samplers.accelerator_type {samplers.accelerator_type!r}: a rank and its sampler share one GPU, so name one "
            "type"
        )
    if not pair_resources(learner, samplers):
        raise ValueError(
            "learner.colocated is true, and num_cpus and num_gpus of learner and samplers are 0: Ray finds no place "
            "for what asks for nothing, so give learner.num_cpus or learner.num_gpus and samplers.num_gpus"
        )
