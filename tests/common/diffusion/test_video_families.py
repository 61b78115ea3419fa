"""Families of video: numbers of frames, steps of their schedulers, half precision, and decoding clip by clip."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.host_loading import network_on_host
from ray_ddpo.common.diffusion.loading.diffusers_config import DiffusersConfig
from ray_ddpo.common.diffusion.lora.adapters import read_weights
from ray_ddpo.common.diffusion.lora.files import SECOND_NAME
from ray_ddpo.common.diffusion.policy import select_rows
from ray_ddpo.common.diffusion.rollout import image_noise, sample_trajectories, score
from ray_ddpo.common.input_images import InputImages
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.learner.sharding_check import check_sharding
from tests.accepted_page import assert_refused
from tests.graph_recorder import Counted
from tests.own_pipelines import own_call
from tests.tiny_families import MAKERS, VIDEO, call_keys, given_latents, policy_table, shown, take_first_order_steps
from tests.tiny_policy import scatter

pytestmark = pytest.mark.rotated(every=2)

PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]
SAMPLING = SamplingTable(num_steps=4, guidance_scale=3.0)


@pytest.fixture(scope="module", params=VIDEO)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, MAKERS[request.param](tmp_path_factory.mktemp("model"))


def config_of(family: tuple[str, Path], **keys: Any) -> DiffusersConfig:
    return build(POLICIES, policy_table(family[0], family[1], **keys), "policy")


def euler(scheduler: Any) -> Any:
    """Return the flow's own scheduler class, with a shift of its own."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=scheduler.config.get("flow_shift") or scheduler.config.shift)


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize(("scale", "num_steps"), [(3.0, 4), (1.0, 7)])
@pytest.mark.parametrize("own_solver", [True, False])
def test_latents_equal_those_of_diffusers_whatever_the_scheduler(
    family: tuple[str, Path], scale: float, num_steps: int, own_solver: bool, tmp_path: Path
) -> None:
    name, model = family
    config = config_of(family)
    pipeline: Any = getattr(diffusers, config.pipeline_class).from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if not own_solver:
        pipeline.scheduler = euler(pipeline.scheduler)
        pipeline.save_pretrained(tmp_path)
        config = config_of((name, tmp_path))
    take_first_order_steps(name, pipeline)
    settings = SamplingTable(num_steps=num_steps, guidance_scale=scale)
    policy = config.load("cpu", settings, "sampler")
    latents = sample_trajectories(policy, PROMPTS, SEEDS, settings, range(0)).final_latents
    noise = next(image_noise(SEEDS, policy.latent_shape))
    keys = {**call_keys(name, scale), "num_inference_steps": num_steps}
    plain = own_call(name, pipeline, PROMPTS, noise, **keys | {"output_type": "latent"})
    torch.testing.assert_close(given_latents(name, latents), torch.stack(plain), rtol=1e-5, atol=1e-5)
    images = shown(own_call(name, pipeline, PROMPTS, noise, **keys))
    difference = np.abs(policy.decode(latents).numpy().astype(int) - images)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005


@pytest.mark.rotated(every=3)
def test_a_number_of_frames_that_the_decoder_cannot_make_is_refused_with_its_neighbours(
    family: tuple[str, Path],
) -> None:
    unit = config_of(family).frames_per_latent
    with pytest.raises(
        ValueError, match=rf"policy.num_frames is 6: .* multiple of {unit}, such as {unit + 1 - unit * (unit > 5)} or"
    ):
        config_of(family, num_frames=6).check()
    for frames in (1, 2 * unit + 1):
        config = config_of(family, num_frames=frames)
        policy = config.load("cpu", SAMPLING, "sampler")
        clips = policy.decode(torch.randn(1, *policy.latent_shape))
        assert clips.shape == (1, frames, *policy.image_size(), 3) and policy.num_frames == frames
        assert config.sizes(SAMPLING, "cpu").latent_shape == policy.latent_shape


def test_in_half_precision_sampler_and_learner_keep_the_weights_that_diffusers_keeps_in_float32(
    family: tuple[str, Path],
) -> None:
    config = config_of(family, dtype="bfloat16")
    sampler, learner = (config.load("cpu", SAMPLING, role) for role in ("sampler", "learner"))
    network: Any = getattr(diffusers, config.network_class).from_pretrained(
        family[1] / config.network_name, torch_dtype=torch.bfloat16
    )
    expected = {name: value.dtype for name, value in (*network.named_parameters(), *network.named_buffers())}
    for policy in (sampler, learner):
        held = (*policy.network.named_parameters(), *policy.network.named_buffers())
        found = {name.replace(".base_layer", ""): value.dtype for name, value in held if "lora_" not in name}
        assert found == expected
    scatter(learner.network)
    sampler.load_weights(read_weights(learner.network, 1))
    trajectory = sample_trajectories(sampler, PROMPTS, SEEDS, SAMPLING)
    assert torch.equal(score(learner, trajectory), trajectory.log_probs)


EXPERTS = [("high_noise", [0, 1, 2, 3]), ("low_noise", [4, 5]), ("both", [0, 1, 2, 3, 4, 5])]


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize(("expert", "own"), EXPERTS)
def test_experts_of_wan_2_2_are_trained_on_their_own_steps_and_load_in_diffusers(
    expert: str, own: list[int], tmp_path: Path
) -> None:
    family, settings = ("wan22", MAKERS["wan22"](tmp_path / "model")), SamplingTable(num_steps=7, guidance_scale=3.0)
    config = config_of(family, expert=expert, guidance_scale_2=2.0)
    sampler, learner = (config.load("cpu", settings, role) for role in ("sampler", "learner"))
    assert sampler.stochastic_steps == own and config.sizes(settings, "cpu").stochastic_steps == len(own)
    scatter(learner.network, deviation=0.3)
    sampler.load_weights(read_weights(learner.network, 1))
    trajectory = sample_trajectories(sampler, PROMPTS, SEEDS, settings)
    assert trajectory.steps.tolist() == [own, own] and torch.equal(score(learner, trajectory), trajectory.log_probs)

    pipeline: Any = diffusers.WanPipeline.from_pretrained(family[1])
    take_first_order_steps("wan22", pipeline)
    restored = config.load("cpu", settings, "learner")
    restored.restore(learner.save(tmp_path))
    assert read_weights(restored.network, 1).fingerprint == read_weights(learner.network, 1).fingerprint
    pipeline.load_lora_weights(tmp_path / "lora", load_into_transformer_2=expert == "low_noise")
    if expert == "both":
        second = {"weight_name": SECOND_NAME, "load_into_transformer_2": True}
        pipeline.load_lora_weights(tmp_path / "lora", adapter_name="second", **second)
    keys = {**call_keys("wan22", 3.0), "guidance_scale_2": 2.0, "num_inference_steps": 7, "output_type": "latent"}
    plain = pipeline(prompt=PROMPTS, latents=next(image_noise(SEEDS, sampler.latent_shape)), **keys).frames
    still = sample_trajectories(sampler, PROMPTS, SEEDS, settings, range(0)).final_latents
    torch.testing.assert_close(still, plain, rtol=1e-5, atol=1e-5)


def test_a_learner_of_one_expert_refuses_steps_of_the_other(tmp_path: Path) -> None:
    config = config_of(("wan22", MAKERS["wan22"](tmp_path)), expert="low_noise")
    with pytest.raises(ValueError, match="sampling has no steps that are trained on, and policy.expert is .low_noise."):
        config.check_sampling(SamplingTable(num_steps=4, deterministic=True))
    learner = config.load("cpu", SAMPLING, "learner")
    with pytest.raises(ValueError, match="policy.expert is 'low_noise', and the learner asks for a step of the other"):
        rows = config.load("cpu", SAMPLING, "sampler").encode(["a cat"])
        learner.transition(torch.randn(1, *learner.latent_shape), torch.tensor([0]), rows)


SAMPLING_OF_BOTH = SamplingTable(num_steps=7)
IDLE: list[tuple[str, dict[str, Any]]] = [  # of 4 steps only the last, without noise, is of the expert for low noise
    ("both", {"num_steps": 4}),
    ("low_noise", {"num_steps": 4}),
    ("both", {"num_steps": 7, "skip_first_steps": 4}),
    ("both", {"num_steps": 7, "skip_last_steps": 2}),
    ("both", {"num_steps": 7, "sde_window": 2, "skip_last_steps": 3}),
    ("high_noise", {"num_steps": 7, "sde_window": 2, "skip_first_steps": 4, "skip_last_steps": 1}),
]


@pytest.mark.parametrize(("expert", "sampling"), IDLE)
def test_an_expert_that_no_step_trains_is_refused(expert: str, sampling: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(("wan22", MAKERS["wan22"](tmp_path)), expert=expert)
    with pytest.raises(ValueError, match=f'policy.expert is "{expert}", and the steps that can be trained on are'):
        config.check_sampling(SamplingTable(**sampling))
    config.check_sampling(SamplingTable(num_steps=4, deterministic=True) if expert == "both" else SAMPLING_OF_BOTH)


def test_guidance_of_one_expert_without_that_of_the_other_is_refused() -> None:
    config = config_of(("wan22", Path("someone/Wan2.2-tuned")), guidance_scale_2=3.0)
    config.check_sampling(SamplingTable(num_steps=20, guidance_scale=2.0))
    with pytest.raises(ValueError, match="policy.guidance_scale_2 is 3 and sampling.guidance_scale 1, with which no"):
        config.check_sampling(SamplingTable(num_steps=20, guidance_scale=1.0))


def test_a_folder_that_lacks_files_of_the_schedule_is_left_to_loading(tmp_path: Path) -> None:
    settings = SamplingTable(num_steps=20)
    for model in ("someone/Wan2.2-T2V-A14B-tuned", str(tmp_path)):
        config = config_of(("wan22", Path(model)), expert="both")
        config.check_sampling(settings)
        assert config.stochastic_steps(settings) == 19


FROM_IMAGE = [("wan_i2v", (16, 16), 3.0), ("wan_i2v", (32, 16), 1.0), ("wan22_i2v", (32, 16), 3.0)]
FROM_IMAGE += [("wan_ti2v", (16, 16), 3.0), ("wan_ti2v", (16, 32), 1.0)]


@pytest.mark.parametrize(("name", "size", "scale"), FROM_IMAGE)
def test_a_video_from_an_image_equals_that_of_diffusers_own_pipeline(
    name: str, size: tuple[int, int], scale: float, tmp_path: Path
) -> None:
    height, width = size
    family, settings = (name, MAKERS[name](tmp_path)), SamplingTable(num_steps=4, guidance_scale=scale)
    config = config_of(family, resolution=None, height=height, width=width)
    sampler, learner = (config.load("cpu", settings, role) for role in ("sampler", "learner"))
    pixels = np.random.default_rng(0).integers(0, 255, (2, height, width, 3), dtype=np.uint8)
    inputs = InputImages(pixels=pixels, masks=np.ones((2, height, width), bool))
    latents = sample_trajectories(sampler, PROMPTS, SEEDS, settings, range(0), inputs=inputs).final_latents
    pipeline: Any = diffusers.WanImageToVideoPipeline.from_pretrained(family[1])
    pipeline.set_progress_bar_config(disable=True)
    take_first_order_steps(name, pipeline)
    noise = next(image_noise(SEEDS, sampler.latent_shape))
    for row, prompt in enumerate(PROMPTS):  # its call takes one image
        keys = call_keys(name, scale) | {"image": Image.fromarray(pixels[row]), "height": height, "width": width}
        keys |= {"num_inference_steps": 4, "latents": noise[row : row + 1], "output_type": "latent"}
        plain = pipeline(prompt=prompt, **keys).frames
        torch.testing.assert_close(latents[row : row + 1], plain, rtol=1e-5, atol=1e-5)
    sampler.load_weights(read_weights(learner.network, 1))
    trajectory = sample_trajectories(sampler, PROMPTS, SEEDS, settings, inputs=inputs)
    assert torch.equal(score(learner, trajectory), trajectory.log_probs)


def test_clips_are_decoded_one_by_one_and_those_without_finite_pixels_are_named(family: tuple[str, Path]) -> None:
    policy = config_of(family).load("cpu", SAMPLING, "sampler")
    latents = torch.randn(3, *policy.latent_shape)
    sound = policy.decode(latents)
    assert policy.not_finite == ()
    latents[1] = torch.nan
    clips = policy.decode(latents)
    assert policy.not_finite == (1,) and torch.equal(clips[::2], sound[::2])


def with_key(folder: Path, file: str, **keys: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def test_models_that_cannot_be_sampled_are_refused_as_documented(tmp_path: Path) -> None:
    wan = MAKERS["wan"](tmp_path / "wan")
    configs = {"frames of a video that the decoder does not make": config_of(("wan", wan), num_frames=6)}
    experts = with_key(MAKERS["wan"](tmp_path / "experts"), "model_index.json", boundary_ratio=0.9)
    configs["a Wan 2.2 with two experts, and the family of one network"] = config_of(("wan", experts))
    noisy = with_key(MAKERS["ltx"](tmp_path / "noisy"), "vae/config.json", decoder_inject_noise=[True] + 3 * [False])
    configs["a decoder of LTX-Video that adds noise of its own"] = config_of(("ltx", noisy))
    for situation, config in configs.items():
        with pytest.raises(ValueError) as refused:
            config.check()
        assert_refused(situation, str(refused.value))


def test_recorded_passes_of_both_experts_are_told_apart_and_have_the_same_bits(tmp_path: Path) -> None:
    config = config_of(("wan22", MAKERS["wan22"](tmp_path)), expert="both")
    settings, recorders = (
        SamplingTable(num_steps=7, guidance_scale=3.0),
        Counted(),
    )  # 4 steps of one expert, 3 of the other
    eager, replayed = (config.load("cpu", settings, "sampler") for _ in range(2))
    scatter(eager.network, deviation=0.3)
    replayed.load_weights(read_weights(eager.network, 1))
    replayed.record_graphs(recorders)
    one, other = (sample_trajectories(policy, PROMPTS, SEEDS, settings) for policy in (eager, replayed))
    assert torch.equal(one.final_latents, other.final_latents) and torch.equal(one.log_probs, other.log_probs)
    assert recorders.recorded == 2


def test_both_experts_need_adapters_and_weights_that_are_not_sharded(tmp_path: Path, tables: dict) -> None:
    table = policy_table("wan22", MAKERS["wan22"](tmp_path), expert="both")
    with pytest.raises(ValueError, match='expert is "both" and train "full"'):
        build(POLICIES, {**table, "train": "full"}, "policy")
    learner = {**tables["learner"], "shard_weights": True, "world_size": 2}
    recipe = Recipe.parse({**tables, "policy": table, "learner": learner})
    with pytest.raises(ValueError, match="shard_weights is true, and policy.expert says that two networks are trained"):
        check_sharding(recipe, build(POLICIES, table, "policy"))


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_the_first_frame_of_a_clip_has_no_part_in_ratios_and_losses(scale: float, tmp_path: Path) -> None:
    config = config_of(("wan_ti2v", MAKERS["wan_ti2v"](tmp_path)))
    policy = config.load("cpu", SamplingTable(num_steps=4, guidance_scale=scale), "sampler")
    scatter(policy.network, deviation=0.3)
    rows = select_rows(policy.encode(["a cat"]), torch.tensor([0]))
    latents = torch.randn(1, *policy.latent_shape, requires_grad=True)
    transition = policy.transition(latents, torch.tensor([0]), rows)
    assert not torch.equal(transition.mean[:, :, 1:], latents[:, :, 1:])
    (moved,) = torch.autograd.grad(transition.mean[:, :, 1:].sum(), latents)
    assert not moved[:, :, 0].any() and moved[:, :, 1:].any()  # the network reads the input image there
    predicted, target = policy.denoise(torch.randn_like(latents), torch.randn_like(latents), torch.tensor([500]), rows)
    assert torch.equal(predicted[:, :, 0], target[:, :, 0]) and not torch.equal(predicted, target)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_training_starts_from_another_programs_lora_of_wan_at_diffusers_strength(prefix: str, tmp_path: Path) -> None:
    model = MAKERS["wan"](tmp_path / "model")
    pipeline: Any = diffusers.WanPipeline.from_pretrained(model)
    found = {"self_attn.q": "attn1.to_q", "cross_attn.o": "attn2.to_out.0"}  # Wan's own names, and diffusers'
    tensors: dict[str, torch.Tensor] = {}
    for own, name in found.items():
        layer = pipeline.transformer.get_submodule(f"blocks.0.{name}")
        key = f"{prefix}blocks.0.{own if prefix == 'diffusion_model.' else name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, layer.in_features)
        tensors[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, 4)
    save_file(tensors, tmp_path / "style.safetensors")
    config = config_of(("wan", model), lora={"path": str(tmp_path / "style.safetensors")})
    policy = config.load("cpu", SAMPLING, "sampler")
    take_first_order_steps("wan", pipeline)
    pipeline.load_lora_weights(tmp_path / "style.safetensors")
    keys = {**call_keys("wan", 3.0), "num_inference_steps": 4, "output_type": "latent"}
    plain = pipeline(prompt=PROMPTS, latents=next(image_noise(SEEDS, policy.latent_shape)), **keys).frames
    latents = sample_trajectories(policy, PROMPTS, SEEDS, SAMPLING, range(0)).final_latents
    torch.testing.assert_close(latents, plain, rtol=1e-5, atol=1e-5)


def test_adapters_begin_alike_if_the_learner_shards_its_weights_or_not(tmp_path: Path) -> None:
    config, begun = config_of(("wan", MAKERS["wan"](tmp_path))), []
    for sharded in (False, True):
        with torch.random.fork_rng(devices=[]), network_on_host(sharded):
            torch.manual_seed(0)
            begun.append(read_weights(config.load("cpu", SAMPLING, "learner").network, 0).fingerprint)
    assert begun[0] == begun[1]
