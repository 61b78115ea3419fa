"""How people would rate a picture: CLIP ViT-L/14's embedding under a head fitted on ratings (DDPO, section 5.2)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from actors.rewards.reward import Images, LoadedReward, Reward
from common.aesthetic_head import read_head
from common.clip_preprocessing import clip_pixels
from common.model_hub import Weights, first_line, is_hub_name, read_from_hub
from common.trajectory import DTYPES

CLIP = "openai/clip-vit-large-patch14"
HEAD_REPOSITORY, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
VIT_L_14_PARAMETERS = 303_966_208  # the image tower with its projection
WANTED = (
    f"the aesthetic reward needs CLIP (config.json and model.safetensors of the hub's {CLIP}) and a head "
    f"({HEAD_FILE} of the hub's {HEAD_REPOSITORY}); where the hub cannot be reached, copy them to this machine, and "
    "set reward.clip to the folder of the first and reward.head to the path of the second"
)

Embed = Callable[[UInt8[Tensor, "B H W 3"]], Float[Tensor, "B D"]]


class Aesthetic(Reward):
    """A rating, about 1 to 10. `clip`: a folder or a hub name; `head`: a path, None: the paper's head from the hub."""

    clip: str = CLIP
    head: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # CLIP's; auto: half on CUDA, float32 elsewhere

    @property
    def memory_bytes(self) -> int:
        # On "auto" a plan counts what a GPU would take.
        return VIT_L_14_PARAMETERS * DTYPES["float16" if self.dtype == "auto" else self.dtype].itemsize

    def needs(self) -> tuple[Weights, ...]:
        head = Path(self.head or HEAD_FILE).expanduser().absolute()
        return (
            Weights(self.clip, ("config.json", "*.safetensors"), "reward.clip"),
            Weights(str(head.parent) if self.head else HEAD_REPOSITORY, (head.name,), "reward.head"),
        )

    def load(self, device: str) -> LoadedReward:
        head = read_head(self.head or _head_from_hub()).to(device)
        dtype = self.dtype if self.dtype != "auto" else "float16" if device.startswith("cuda") else "float32"
        embed, dimension = load_embedder(self.clip, device, DTYPES[dtype])
        if dimension != head.dimension:
            raise ValueError(
                f"reward.clip {self.clip!r} gives embeddings of {dimension} numbers, "
                f"and reward.head {self.head or HEAD_FILE!r} takes {head.dimension}: they must be of one kind"
            )

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            # A copy: pictures out of Ray's store are read-only, and torch warns of sharing them.
            pixels = torch.from_numpy(np.array(images)).to(device)
            return head(embed(pixels)).cpu().numpy()

        return score


def load_embedder(clip: str, device: str, dtype: torch.dtype) -> tuple[Embed, int]:
    """The function from pictures to CLIP's projected embeddings of L2 norm 1, in float32, and their dimension."""
    tower = _image_tower(clip, dtype).to(device).eval().requires_grad_(False)
    side = tower.config.image_size

    @torch.no_grad()
    def embed(images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B D"]:
        embeddings = tower(pixel_values=clip_pixels(images, side).to(dtype)).image_embeds.float()
        return embeddings / embeddings.norm(dim=-1, keepdim=True)

    return embed, tower.config.projection_dim


def _image_tower(clip: str, dtype: torch.dtype) -> Any:
    from transformers import CLIPVisionModelWithProjection

    missing = f"reward.clip is {clip!r}, which cannot be loaded: {WANTED}"
    folder = Path(clip).expanduser()
    source = folder if folder.is_dir() else clip

    def read(local_files_only: bool) -> Any:
        with _errors_only():  # a whole CLIP has a text tower, and each of its weights would be reported as not needed
            return CLIPVisionModelWithProjection.from_pretrained(
                source, dtype=dtype, local_files_only=local_files_only, output_loading_info=True
            )

    if source == clip and is_hub_name(clip):
        tower, loading = read_from_hub(read, missing)
    else:
        try:
            tower, loading = read(True)
        except OSError as error:
            raise ValueError(f"{missing} ({first_line(error)})") from None
    if loading["missing_keys"]:
        # Transformers would fill them with random numbers, and the ratings would be noise.
        raise ValueError(f"{missing} (weights are missing: {sorted(loading['missing_keys'])[0]} and others)")
    return tower


@contextmanager
def _errors_only() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _head_from_hub() -> str:
    from huggingface_hub import hf_hub_download

    def read(local_files_only: bool) -> str:
        return hf_hub_download(HEAD_REPOSITORY, HEAD_FILE, local_files_only=local_files_only)

    return read_from_hub(read, f"reward.head is not given, and its weights cannot be had: {WANTED}")
