"""Choose how a role's network runs: compiled, replayed as CUDA graphs, or kernel by kernel."""

import torch

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.compile_turns import compile_in_turn
from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig, Role, select_rows
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.trajectory import DTYPES
from ray_ddpo.common.user_code.blame import is_users_own


def set_up_execution(config: PolicyConfig, policy: Policy, role: Role, batch_size: int) -> None:
    """Set the network up for batches of this size: to be compiled at its first call, to record CUDA graphs, or neither.

    Raises:
        ValueError: The policy does not support what the recipe asks for.
    """
    is_recomputed = getattr(policy.network, "is_gradient_checkpointing", False)
    if config.is_compiled(role):
        policy.compile(batch_size)
    elif records_graphs(config, policy.device, is_recomputed):
        policy.record_graphs()
    elif config.cuda_graphs is True and is_recomputed:  # which "auto" has found at the start
        print_line(
            "policy.cuda_graphs: the learner re-computes its activations, which cannot be recorded "
            f"(policy.gradient_checkpointing is {config.gradient_checkpointing!r}); its kernels are launched one by one, "
            "with the same bits, and samplers replay graphs"
        )


def compile_sampling(config: PolicyConfig, policy: Policy, sampling: SamplingTable) -> None:
    """Compile a sampler's network, if the recipe says so, by a step on zeros in the shapes of a task."""
    if not config.is_compiled("sampler"):
        return

    @torch.no_grad()
    def step() -> None:
        rows = torch.zeros(sampling.batch_size, dtype=torch.long, device=policy.device)
        conditioning = select_rows(policy.encode([""]), rows)
        latents = torch.zeros(len(rows), *policy.latent_shape, device=policy.device)
        policy.transition(latents.to(DTYPES[sampling.latents_dtype]), rows, conditioning)

    key = "\n".join([type(config).__qualname__, config.model_dump_json(), sampling.model_dump_json()])
    compile_in_turn("sampler", key, step)


def records_graphs(config: PolicyConfig, device: str, is_recomputed: bool = False) -> bool:
    """Return whether a network that is not compiled is replayed as CUDA graphs.

    `auto` leaves out a user's own family, whose network may keep state between calls, and full fine-tuning, whose
    recordings would hold a second gradient of every weight.
    """
    if is_recomputed or config.cuda_graphs != "auto":
        return config.cuda_graphs is True and not is_recomputed
    return device.startswith("cuda") and config.train == "lora" and not is_users_own(config, POLICIES)


def refuse_graphs_without_gpu(config: PolicyConfig, device: str) -> None:
    """Raise ValueError if CUDA graphs are required on a device that has none."""
    if config.cuda_graphs is True and not device.startswith("cuda"):
        raise ValueError(
            f"policy.cuda_graphs is true, and a role of the run computes on the {device.upper()}, which has no CUDA "
            'graphs: give "auto" or false, or give the role num_gpus'
        )
