"""Methods of a policy that some algorithms and prompt sources need. A family may leave each of them out."""

from jaxtyping import Float, UInt8
from torch import Tensor


class OptionalMethods:
    """The part of a policy's interface that a family may leave out. By default each method says what it is for."""

    # False: `denoise` predicts for the prompt alone. A family that honours it has `denoises_unguided = True`.
    guides_denoising: bool = True
    # Input images that `encode` reads beside a prompt, as its second argument: ("image",) or ("image", "mask").
    reads_inputs: tuple[str, ...] = ()
    most_inputs: int = 1  # input images of a prompt, at most

    num_frames: int = 1  # of what `decode` gives: above 1 it is a video, with an axis of frames
    frame_rate: float = 1.0  # a video's frames a second

    def finished(self, latents: Float[Tensor, "B C *S"], conditioning: dict[str, Tensor]) -> Float[Tensor, "B C *S"]:
        """Return the latents of an image after its last step. In most families these are the latents themselves."""
        return latents

    def decode_pixels(self, latents: Float[Tensor, "B C *S"]) -> Float[Tensor, "B 3 H2 W2"]:
        """Return the images of final latents with gradients, in float32 from 0 to 1. `decode` rounds the same numbers.

        Raises:
            ValueError: The family decodes without gradients only. This is the default.
        """
        raise ValueError(
            f"{type(self).__name__} has no decode_pixels, through which a reward's gradient reaches the latents: take an "
            "algorithm without differentiable rewards, or give the family this method"
        )

    def encode_images(
        self, pixels: UInt8[Tensor, "B H2 W2 3"], noise: Float[Tensor, "B C *S"]
    ) -> Float[Tensor, "B C *S"]:
        """Return final latents that `decode` makes these images of. A family with it has `takes_images = True`.

        Args:
            pixels: on the policy's device.
            noise: standard normal, for an encoder that gives a distribution of latents.

        Raises:
            ValueError: The family has no encoder. This is the default.
        """
        raise ValueError(f"{type(self).__name__} has no encode_images, so it cannot train on given images")
