"""Qwen-Image-Edit and its later versions (Qwen team 2025): the language model and the transformer see an input image."""

from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy, NetworkCall
from ray_ddpo.common.diffusion.editing_policy import EditingPolicy, joined_rows
from ray_ddpo.common.diffusion.families.masked_text import masked_rows
from ray_ddpo.common.diffusion.families.qwen_image import (
    QWEN_IMAGE,
    UNCONDITIONAL,
    QwenImageFamily,
    QwenImagePolicy,
    call_transformer,
)
from ray_ddpo.common.diffusion.guidance import INPUT, NEGATIVE
from ray_ddpo.common.diffusion.loading.model_index import read_object
from ray_ddpo.common.diffusion.loading.model_sizes import Configs
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.diffusion.prompt_lengths import TextReader, tokens_before
from ray_ddpo.common.input_images import InputImages
from ray_ddpo.common.recipe.tables import SamplingTable

IMAGE_MARK = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"  # before the prompt, in the later versions
# As in the file of Qwen/Qwen-Image-Edit.
PROCESSOR = {"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "merge_size": 2}
ZERO_CONDITION: Configs = QWEN_IMAGE | {"transformer": QWEN_IMAGE["transformer"] | {"zero_cond_t": True}}


def call_editing_transformer(
    network: Any,
    latents: Tensor,
    timesteps: Tensor,
    input_prompt_embeds: Tensor,
    input_prompt_embeds_mask: Tensor,
    input_latents: Tensor,
) -> Tensor:
    """Return the transformer's velocity prediction per row."""
    return call_transformer(network, latents, timesteps, input_prompt_embeds, input_prompt_embeds_mask, input_latents)


class QwenImageEditPolicy(EditingPolicy, QwenImagePolicy):
    """A loaded QwenImageEditPipeline. The states of a prompt depend on its input image, and so do those of the negative."""

    config: "QwenImageEditFamily"

    def _encode_texts(self, prompts: list[str], inputs: InputImages) -> Conditioning:
        images = [Image.fromarray(pixels) for pixels in inputs.pixels]
        negative = UNCONDITIONAL if self.negative_prompt is None else self.negative_prompt
        with self._at_work(*self.text_encoders):
            texts = zip(prompts, images, strict=True)
            found = joined_rows([self._states(prompt, image, INPUT) for prompt, image in texts])
            if self.branches == 2:
                found |= joined_rows([self._states(negative, image, NEGATIVE + INPUT) for image in images])
        return found

    def _states(self, text: str, image: Image.Image, prefix: str) -> Conditioning:
        """Return the language model's states of a text with an image. Their names begin with `prefix`."""
        length, size = self.config.row_length(self.image_size()), self.config.shown_size(self.image_size())
        shown = self.pipeline.image_processor.resize(image, *size)
        embeds, _ = self.pipeline.encode_prompt(text, image=shown, device=self.device)
        return {prefix + name: row for name, row in masked_rows(embeds[:, :length], length).items()}

    def text_readers(self) -> list[TextReader]:
        pipeline = self.pipeline
        # The mark of an image is one of these tokens, and the image's own have places beside.
        template = pipeline.prompt_template_encode.format(f"{self.config.image_mark}{{}}").format
        before = tokens_before(pipeline.tokenizer, template) - pipeline.prompt_template_encode_start_idx
        return [TextReader("text_encoder", pipeline.tokenizer, self.config.max_sequence_length - before + 1)]

    def _encode_input(self, pixels: Float[Tensor, "1 3 H2 W2"], mask: Float[Tensor, "1 1 H2 W2"]) -> Conditioning:
        return {"input_latents": self._latents_of(pixels)}


class QwenImageEditFamily(QwenImageFamily):
    """What all versions share. Input and output have one size."""

    reads_inputs: ClassVar[tuple[str, ...]] = ("image",)
    policy_class: ClassVar[type[DiffusersPolicy]] = QwenImageEditPolicy
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "processor")
    image_mark: ClassVar[str]  # text that stands for the image before the prompt, unless the template has it

    def shown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the image that the language model sees, for an input image of this size."""
        return size

    def row_length(self, size: tuple[int, int]) -> int:
        """Return how many states of the language model the network reads, for an input image of this size."""
        from ray_ddpo.common.diffusion.loading.image_text_reader import image_tokens

        file = self.folder() / "processor" / "preprocessor_config.json"
        keys = read_object(file) if file.is_file() else PROCESSOR
        return image_tokens(keys, self.shown_size(size)) + self.max_sequence_length

    def made_parts(self, folder: Path) -> dict[str, Any]:
        from ray_ddpo.common.diffusion.loading.image_text_reader import image_text_reader

        return {"processor": image_text_reader(folder / "processor")}

    def network_call(self, sampling: SamplingTable) -> NetworkCall:
        return call_editing_transformer

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        channels, *sides = self.latent_shape(configs["transformer"])
        length = self.row_length((self.scale_factor * sides[0], self.scale_factor * sides[1]))
        width = configs["transformer"]["joint_attention_dim"]
        texts = {f"{INPUT}prompt_embeds": (length, width), f"{INPUT}prompt_embeds_mask": (length,)}
        return texts | {"input_latents": (channels, *sides)}

    def with_negative(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return shapes | {NEGATIVE + name: shape for name, shape in shapes.items() if name != "input_latents"}


class QwenImageEdit(QwenImageEditFamily):
    """Qwen-Image-Edit."""

    pipeline_class: ClassVar[str] = "QwenImageEditPipeline"
    image_mark: ClassVar[str] = ""
    published: ClassVar[dict[str, Configs]] = {"Qwen/Qwen-Image-Edit": QWEN_IMAGE}


class QwenImageEditPlus(QwenImageEditFamily):
    """Qwen-Image-Edit-2509 and -2511, whose language model sees a small copy of the input image."""

    pipeline_class: ClassVar[str] = "QwenImageEditPlusPipeline"
    image_mark: ClassVar[str] = IMAGE_MARK
    published: ClassVar[dict[str, Configs]] = {
        "Qwen/Qwen-Image-Edit-2509": QWEN_IMAGE,
        "Qwen/Qwen-Image-Edit-2511": ZERO_CONDITION,
    }

    def shown_size(self, size: tuple[int, int]) -> tuple[int, int]:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
            CONDITION_IMAGE_SIZE,
            calculate_dimensions,
        )

        width, height = calculate_dimensions(CONDITION_IMAGE_SIZE, size[1] / size[0])
        return height, width
