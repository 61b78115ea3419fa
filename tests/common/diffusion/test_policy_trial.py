"""The trial of a user's own family before the first round names class, method, expected and given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from shape_network import ShapeNetwork
from shapes import Shapes, ShapesPolicy

from ray_ddpo.actors.sampler import Sampler
from ray_ddpo.common.diffusion.families.wan import Wan
from ray_ddpo.common.diffusion.lora.adapters import read_weights, trained_parameters
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.policy_trial import load_checked, try_sampling
from ray_ddpo.common.diffusion.transition import Transition
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RuntimeTable, SamplingTable
from ray_ddpo.deploy.driver.components import components_of
from ray_ddpo.learner.learning_trial import try_learning
from tests.conftest import small_tables
from tests.tiny_families import policy_table, save_tiny_shapes
from tests.tiny_video import FRAMES, save_tiny_wan

SAMPLING = SamplingTable(num_steps=4, guidance_scale=2.0)
PROMPTS = (Prompt("disc"), Prompt("ring"))


def transition_of(change: Callable[[Any, Any], Transition]) -> Callable[..., Transition]:
    """Return the family's transition with a changed result."""

    def transition(self: Any, latents: Any, steps: Any, conditioning: Any, stochastic: bool = True) -> Transition:
        right = ShapesPolicy.transition(self, latents, steps, conditioning, stochastic)
        return change(right.mean, right.std)

    return transition


def first_step_for_all(self: Any, latents: Any, steps: Any, conditioning: Any, stochastic: bool = True) -> Transition:
    return ShapesPolicy.transition(self, latents, torch.full_like(steps, int(steps[0])), conditioning, stochastic)


def random_mean(mean: torch.Tensor, std: torch.Tensor) -> Transition:
    return Transition(mean + 0.1 * torch.randn_like(mean), std)


def save_pickled(self: Any, folder: Path) -> Path:
    (folder / "lora").mkdir()
    torch.save(self.network.state_dict(), folder / "lora" / "pytorch_lora_weights.safetensors")
    return folder / "lora"


def save_zeros(self: Any, folder: Path) -> Path:
    written = ShapesPolicy.save(self, folder)
    zeros = {
        f"unet.{name.replace('.default', '')}": 0 * value for name, value in trained_parameters(self.network).items()
    }
    save_file(zeros, written)
    return written


def raises(self: Any, *arguments: Any) -> None:
    raise KeyError("middle")


def halved(value: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return value | {"label": value["label"][:1]}


WITHOUT_NAME = "returned 'label' as int64 of shape (1,), from 0 to 0: expected a tensor with 2 rows for 2 prompts"
# Mistakes in a policy's methods, and the error that names each.
SAMPLING_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "mean": (
        {"transition": transition_of(lambda mean, std: Transition(mean[..., :15], std))},
        "Mine.transition returned a mean of float32 of shape (2, 3, 16, 15), from -",
    ),
    "mean_nan": (
        {"transition": transition_of(lambda mean, std: Transition(mean / 0, std))},
        "Mine.transition returned a mean of float32 of shape (2, 3, 16, 16), 1536 of 1536 not finite: expected float32 "
        "of shape (2, 3, 16, 16), all finite",
    ),
    "std_zero": (
        {"transition": transition_of(lambda mean, std: Transition(mean, 0 * std))},
        "Mine.transition gave a std of [0.0, 0.0]",
    ),
    "std_negative": (
        {"transition": transition_of(lambda mean, std: Transition(mean, -std))},
        "Mine.transition gave a std of [-",
    ),
    "std_nan": (
        {"transition": transition_of(lambda mean, std: Transition(mean, std * float("nan")))},
        "Mine.transition returned a std of float32 of shape (2,), 2 of 2 not finite",
    ),
    "one_step_for_all": (
        {"transition": first_step_for_all},
        "Mine.transition gave a row another mean or std among others than alone",
    ),
    "randomness": ({"transition": transition_of(random_mean)}, "Mine.transition gave two means for one input"),
    "never_without_noise": (
        {"transition": transition_of(lambda mean, std: Transition(mean, std.clamp(min=0.1)))},
        "Mine.transition with stochastic=False gave a std of [0.1",
    ),
    "signature": (
        {"transition": lambda self, latents, steps, conditioning: None},
        "Mine.transition takes (latents, steps, conditioning): it is called with (latents, steps, conditioning, stochastic)",
    ),
    "no_transition": (
        {"transition": lambda self, *arguments: None},
        "Mine.transition returned None: expected a Transition of mean and std",
    ),
    "rows": (
        {"encode": lambda self, prompts: halved(ShapesPolicy.encode(self, prompts))},
        f"Mine.encode {WITHOUT_NAME}",
    ),
    "encode_raises": ({"encode": raises}, f"Mine.encode raised KeyError: 'middle' ({__file__}:"),
    "missing": ({"encode": None}, "Mine.encode is missing, or is no method: a Policy needs it"),
    "floats": (
        {"decode": lambda self, latents: latents.clamp(-1, 1).permute(0, 2, 3, 1)},
        "Mine.decode returned float32 of shape (2, 16, 16, 3), from -1 to 1: expected uint8 of shape (2, height, width, 3)",
    ),
    "layout": (
        {"decode": lambda self, latents: ShapesPolicy.decode(self, latents).permute(0, 3, 1, 2)},
        "Mine.decode returned uint8 of shape (2, 3, 16, 16), from 0 to 255: expected uint8 of shape (2, height, width, 3)",
    ),
    "latents": (
        {"initial_latents": lambda self, noise: noise.double().log()},
        "Mine.initial_latents returned float64 of shape (2, 3, 16, 16),",
    ),
    "denoise": (
        {"denoise": lambda self, clean, noise, timesteps, conditioning: clean},
        "Mine.denoise returned float32 of shape (2, 3, 16, 16), from",
    ),
    "stochastic_steps": (
        {"stochastic_steps": [0, 1, 2, 9]},
        "Mine.stochastic_steps is [0, 1, 2, 9]: expected a list of the stochastic steps, of 0 to 3",
    ),
}
LEARNING_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no_grad": (
        {"transition": torch.no_grad()(ShapesPolicy.transition)},
        "Mine.transition gave a mean without gradients: expected gradients of what is trained",
    ),
    "save_raises": ({"save": raises}, "Mine.save raised KeyError: 'middle'"),
    "save_pickled": ({"save": save_pickled}, "Mine.save wrote files that cannot be read: reading them raised"),
    "save_nothing": (
        {"save": lambda self, folder: folder / "lora"},
        "Mine.save returned PosixPath: expected the path of what it wrote",
    ),
    "save_zeros": (
        {"save": save_zeros},
        "Mine.save wrote other numbers than the network has: expected its trained weights",
    ),
    "restore_nothing": (
        {"restore": lambda self, path: None},
        "Mine.restore gave other weights than Mine.save wrote, at ['enter.lora_A.default.weight'",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_shapes(tmp_path_factory.mktemp("shapes")))


class MyShapes(Shapes):
    """The example's family with other methods, or another network."""

    def load(self, device: str, sampling: SamplingTable, role: str) -> Any:
        return self.made(device, sampling, role)

    def made(self, *arguments: Any) -> Any:
        return super().load(*arguments)


def family(model: str, methods: dict[str, Any] | None = None, network: Any = None, **keys: Any) -> MyShapes:
    def load(self: Any, device: str, sampling: SamplingTable, role: str) -> Policy:
        made = network() if network else ShapeNetwork()
        return type("Mine", (ShapesPolicy,), methods or {})(self, made.eval(), device, sampling, role)

    return type("MyShapes", (MyShapes,), {"made": load})(model=model, **keys)


def sampled(config: MyShapes) -> None:
    try_sampling(config, load_checked(config, "cpu", SAMPLING, "sampler"), ["disc", "ring"])


def recipe_of(model: str, folder: Path, algorithm: str = "ddpo_is") -> Recipe:
    tables = small_tables(Path(model), folder)
    tables["policy"]["name"], tables["algorithm"] = "shapes:Shapes", {"name": algorithm}
    tables["learner"]["micro_batch_size"] = 4
    return Recipe.parse(tables)


def learned(config: MyShapes, folder: Path, algorithm: str = "ddpo_is") -> Policy:
    recipe = recipe_of(config.model, folder, algorithm)
    policy = load_checked(config, "cpu", recipe.sampling, "learner")
    try_learning(policy, config, components_of(recipe).algorithm, recipe)
    return policy


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize("mistake", SAMPLING_MISTAKES)
def test_a_mistake_in_sampling_is_named_with_what_was_expected(mistake: str, model: str) -> None:
    methods, message = SAMPLING_MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        sampled(family(model, methods))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def own_steps(self: Any, sampling: SamplingTable) -> Any:
    return self.steps


def own_noise(self: Any, latents: Any, timesteps: Any, conditioning: Any) -> Any:
    return self._noise(latents.float(), timesteps, conditioning)


OTHER_STEPS_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no_table": ({"denoising_steps": lambda self, sampling: None}, "Mine.denoising_steps returned None"),
    "too_small": (
        {"predict": lambda self, latents, timesteps, conditioning: latents[:1]},
        "Mine.predict returned float32 of shape (1, 3, 16, 16)",
    ),
    "not_the_network": (
        {"predict": lambda self, latents, timesteps, conditioning: latents.float()},
        "Mine.predict and denoising_steps make another deterministic step than transition",
    ),
}


@pytest.mark.parametrize("mistake", OTHER_STEPS_MISTAKES)
def test_a_family_that_takes_other_steps_is_tried_with_them(mistake: str, model: str) -> None:
    methods, message = OTHER_STEPS_MISTAKES[mistake]
    right = {"denoising_steps": own_steps, "predict": own_noise}
    with pytest.raises(ValueError) as error:
        sampled(taking_other_steps(model, right | methods))
    assert str(error.value).startswith(message)
    sampled(taking_other_steps(model, right))


def taking_other_steps(model: str, methods: dict[str, Any]) -> MyShapes:
    made = family(model, methods)
    return type("OtherSteps", (type(made),), {"takes_other_steps": True})(model=model)


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize("mistake", LEARNING_MISTAKES)
def test_a_mistake_in_learning_or_files_is_named_with_what_was_expected(
    mistake: str, model: str, tmp_path: Path
) -> None:
    methods, message = LEARNING_MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        learned(family(model, methods), tmp_path)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_load_raises_or_returns_is_named_too(model: str) -> None:
    for result, message in (
        (lambda self, *arguments: raises(self), f"MyShapes.load raised KeyError: 'middle' ({__file__}:"),
        (lambda self, *arguments: None, "MyShapes.load returned None: expected a ray_ddpo.Policy"),
    ):
        with pytest.raises(ValueError) as error:
            load_checked(type("MyShapes", (MyShapes,), {"made": result})(model=model), "cpu", SAMPLING, "sampler")
        assert str(error.value).startswith(message)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_trial_changes_neither_weights_nor_random_states(train: str, model: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = family(
        model, {"transition": transition_of(lambda mean, std: Transition(mean, std + 0 * torch.rand(1)))}, train=train
    )
    policy = load_checked(config, "cpu", SAMPLING, "learner")
    before, expected = read_weights(policy.network, 0), torch.get_rng_state()
    recipe = recipe_of(model, tmp_path)
    try_sampling(config, policy, ["disc", "ring"])
    try_learning(policy, config, components_of(recipe).algorithm, recipe)
    assert read_weights(policy.network, 0).fingerprint == before.fingerprint
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(parameter.grad is None for parameter in policy.network.parameters())


def test_a_missing_denoise_stops_only_algorithms_that_need_it(model: str, tmp_path: Path) -> None:
    def denoise(self: Any, *arguments: Any) -> None:
        raise NotImplementedError("only for DDPO")

    config = family(model, {"denoise": denoise})
    sampled(config)
    learned(config, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"RewardWeightedRegression.compute_loss raised NotImplementedError: only for DDPO \(/.*test_pol",
    ):
        learned(config, tmp_path, "rwr")


def test_a_samplers_constructor_tries_it(model: str) -> None:
    broken = family(model, {"decode": lambda self, latents: latents})
    with pytest.raises(ValueError, match=r"Mine.decode returned float32 of shape \(2, 3, 16, 16\)"):
        Sampler(broken, SAMPLING, RuntimeTable(), PROMPTS)
    Sampler(family(model), SAMPLING, RuntimeTable(), PROMPTS)


def test_a_family_of_video_is_tried_on_its_clips(tmp_path: Path) -> None:
    keys = {key: value for key, value in policy_table("wan", save_tiny_wan(tmp_path)).items() if key != "name"}
    config = type("MyWan", (Wan,), {"__module__": __name__})(**keys)
    policy = load_checked(config, "cpu", SAMPLING, "sampler")
    assert try_sampling(config, policy, ["a cat"]) == (16, 16)
    policy.num_frames = 4
    with pytest.raises(ValueError, match=rf"of shape \(2, {FRAMES}, 16, 16, 3\), .* expected uint8 of shape \(2, 4, "):
        try_sampling(config, policy, ["a cat"])
    of_images = type("MyWan", (Wan,), {"__module__": __name__, "has_frames": False})(**keys)
    with pytest.raises(ValueError, match=r"latent_shape is \(4, 2, 4, 4\): expected .*of a video, has_frames = True"):
        load_checked(of_images, "cpu", SAMPLING, "sampler")
