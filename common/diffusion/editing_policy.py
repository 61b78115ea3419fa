"""Encode a prompt's input image beside its text, for the policies of editing families."""

from abc import abstractmethod

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from ray_ddpo.common.diffusion.diffusers_policy import DiffusersPolicy
from ray_ddpo.common.diffusion.policy import Conditioning
from ray_ddpo.common.input_images import InputImages, blank_inputs


def joined_rows(rows: list[Conditioning]) -> Conditioning:
    """Return single rows below each other, by name."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


class EditingPolicy(DiffusersPolicy):
    """A loaded pipeline that edits images. Input images are encoded without noise, so that their rows never change."""

    @torch.no_grad()
    def encode(self, prompts: list[str], inputs: InputImages | None = None) -> Conditioning:
        inputs = inputs or blank_inputs(len(prompts), self.image_size(), self.most_inputs)
        texts = self._encode_texts(prompts, inputs)
        with self._at_work(self.vae):
            # One image at a time: in a batch, its last bits would depend on the other images.
            rows = [
                self._encode_inputs([self._pixels(image) for image in images], self._mask(mask))
                for images, mask in zip(inputs.images, inputs.masks, strict=True)
            ]
        return texts | joined_rows(rows)

    def _encode_texts(self, prompts: list[str], inputs: InputImages) -> Conditioning:
        """Return the rows of the text encoders, which in some families see the input images too."""
        return super().encode(prompts)

    def _encode_inputs(
        self, images: list[Float[Tensor, "1 3 H2 W2"]], mask: Float[Tensor, "1 1 H2 W2"]
    ) -> Conditioning:
        """Return the rows of a prompt's input images. By default there is one."""
        return self._encode_input(images[0], mask)

    @abstractmethod
    def _encode_input(self, pixels: Float[Tensor, "1 3 H2 W2"], mask: Float[Tensor, "1 1 H2 W2"]) -> Conditioning:
        """Return the rows of one input image, named `input_…`.

        Args:
            pixels: from −1 to 1, in the decoder's dtype.
            mask: 1 where the image may change, else 0.
        """

    def _latents_of(self, pixels: Float[Tensor, "1 3 *S2"]) -> Float[Tensor, "1 C *S"]:
        """Return the mode of the encoder's posterior, as the network takes latents."""
        return self._scaled(
            self.config.encoded(self.vae, pixels, torch.zeros(1, *self.latent_shape, device=pixels.device))
        )

    def _pixels(self, image: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "1 3 H W"]:
        """Return an image as the encoder takes it."""
        pixels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1).unsqueeze(0)
        # In the order of diffusers' VaeImageProcessor, whose rounding this has: to 0 … 1, then to −1 … 1.
        return (2 * (pixels.float() / 255) - 1).to(self.vae.dtype)

    def _mask(self, mask: Bool[np.ndarray, "H W"]) -> Float[Tensor, "1 1 H W"]:
        """Return a mask on the device."""
        return torch.from_numpy(np.array(mask)).to(self.device)[None, None].float()
