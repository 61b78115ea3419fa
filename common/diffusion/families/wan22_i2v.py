"""Wan 2.2 image to video (Wan Team 2025): two experts that read the first frame's latents, and no image encoder."""

from typing import ClassVar

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.families.first_frame import FirstFrame, FirstFramePolicy
from ray_ddpo.common.diffusion.families.wan22 import Experts, ExpertsPolicy
from ray_ddpo.common.diffusion.families.wan_published import WAN_22_I2V_A14B
from ray_ddpo.common.diffusion.loading.model_sizes import Configs


class ExpertsImagePolicy(ExpertsPolicy, FirstFramePolicy):
    """A loaded WanImageToVideoPipeline with two experts."""

    config: "Wan22Image"


class Wan22Image(Experts, FirstFrame):
    """Wan 2.2 A14B, image to video, with one expert or both trained: the input image is the first frame."""

    policy_class: ClassVar[type[DiffusersPolicy]] = ExpertsImagePolicy
    published: ClassVar[dict[str, Configs]] = {"Wan-AI/Wan2.2-I2V-A14B-Diffusers": WAN_22_I2V_A14B}
