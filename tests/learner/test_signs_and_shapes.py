"""Training images of the model that writes show what their captions say, and the rewards see it."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from ray_ddpo.actors.rewards.geneval import GenEval
from ray_ddpo.actors.rewards.ocr import Ocr
from ray_ddpo.common.prompt_set import shipped_prompts
from ray_ddpo.learner.pretraining.autoencoder import decode, encode
from ray_ddpo.learner.pretraining.flow_denoiser import (
    BATCH,
    SIGNS,
    FlowDenoiser,
    FlowMaterial,
    sample_flow_batch,
    sample_sigmas,
)
from ray_ddpo.learner.pretraining.flow_modules import (
    build_flow_autoencoder,
    build_flow_scheduler,
    build_letter_tokenizer,
)
from ray_ddpo.learner.pretraining.signs_and_shapes import (
    all_scenes,
    draw_shapes,
    draw_sign,
    held_out_words,
    random_shapes,
    random_sign,
    trained_scenes,
)


def test_the_rewards_find_every_test_prompt_in_its_drawing() -> None:
    generator, scenes = np.random.default_rng(0), {scene.text: scene for scene in all_scenes()}
    words, shapes = shipped_prompts("words", "test")[::4], shipped_prompts("shapes", "test")[::3]
    signs = np.stack([draw_sign(prompt.text.split('"')[1], generator) for prompt in words])
    scores = Ocr(measure="strict", detect=False).load("cpu")(signs, [p.text for p in words], [{}] * len(words))
    assert scores.mean() >= 0.9
    images = np.stack([draw_shapes(scenes[prompt.text], generator) for prompt in shapes])
    reward = GenEval(measure="strict", detector="shapes").load("cpu")
    assert reward(images, [p.text for p in shapes], [p.metadata for p in shapes]).mean() == 1


def test_no_training_image_shows_a_test_prompt() -> None:
    generator, test = np.random.default_rng(0), {prompt.text for prompt in shipped_prompts("shapes", "test")}
    assert not any(random_sign(generator).caption.split('"')[1] in held_out_words() for _ in range(100))
    assert not test & {scene.text for scenes in trained_scenes().values() for scene in scenes}
    assert not test & {random_shapes(generator).caption for _ in range(100)}


def test_captions_are_those_of_their_images_or_dropped_and_signs_have_their_share() -> None:
    ids = torch.arange(1, 11)
    material = FlowMaterial(
        latents=ids[:, None, None, None].expand(10, 8, 16, 16).half(),
        token_ids=ids[:, None].expand(10, 16),
        no_caption=torch.zeros(16, dtype=torch.long),
        signs=torch.tensor(3),
    )
    batches = [sample_flow_batch(material, torch.Generator().manual_seed(seed)) for seed in range(40)]
    latents, token_ids = (torch.cat(column) for column in zip(*batches, strict=True))
    image, said = latents[:, 0, 0, 0].long(), token_ids[:, 0]
    assert torch.equal(said[said != 0], image[said != 0]) and set(image.tolist()) == set(ids.tolist())
    assert (image <= 3).float().mean() == pytest.approx(SIGNS, abs=0.05)
    assert 0.01 < (said == 0).float().mean() < 0.1


def test_noise_levels_lie_between_0_and_1_and_more_often_near_noise() -> None:
    sigmas = sample_sigmas(40 * BATCH, torch.Generator().manual_seed(0))
    assert sigmas.min() > 0 and sigmas.max() < 1 and 0.58 < sigmas.mean() < 0.7


def test_captions_are_encoded_in_training_as_the_pipeline_encodes_them() -> None:
    torch.manual_seed(0)
    denoiser, prompts = FlowDenoiser().eval(), ['a sign that says "CAT"', "two red circles"]
    for parameter in denoiser.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)  # some layers begin as zeros, through which no caption shows
    tokenizers = {"tokenizer": build_letter_tokenizer(), "tokenizer_2": build_letter_tokenizer()}
    pipeline = StableDiffusion3Pipeline(
        transformer=denoiser.transformer,
        scheduler=build_flow_scheduler(),
        vae=build_flow_autoencoder(),
        text_encoder_3=None,
        tokenizer_3=None,
        **dict(denoiser.text_encoders.items()),
        **tokenizers,
    )
    with torch.no_grad():
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=1
        )
        latents, sigmas = torch.randn(2, 8, 16, 16), torch.tensor([0.9, 0.3])
        expected = denoiser.transformer(latents, embeddings, pooled, 1000 * sigmas).sample
        token_ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        found = denoiser(latents, sigmas, token_ids)
        other = denoiser(latents, sigmas, token_ids.flip(0))
    error = (found - expected).abs().mean()  # training computes in bfloat16
    assert error < 0.02 * expected.abs().mean() and error < 0.3 * (other - expected).abs().mean()


def test_a_variational_autoencoder_is_encoded_to_its_mean() -> None:
    torch.manual_seed(0)
    autoencoder = build_flow_autoencoder().eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        posterior = autoencoder.encode(images.float() / 127.5 - 1).latent_dist
    assert isinstance(autoencoder, AutoencoderKL)
    latents = encode(autoencoder, images)
    assert torch.allclose(latents, posterior.mode(), atol=1e-5) and posterior.std.max() < 1e-3
    assert decode(autoencoder, latents).shape == images.shape
