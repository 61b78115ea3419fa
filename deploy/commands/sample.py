"""ddpo sample: sample images with a run's weights, as PNGs, or clips as mp4 files beside their posters."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ray_ddpo.actors.evaluation.eval_set import decoded
from ray_ddpo.common.clips import is_clip, poster
from ray_ddpo.common.diffusion.policy import Policy
from ray_ddpo.common.diffusion.prompt_lengths import print_cut_prompts
from ray_ddpo.common.diffusion.rollout import evaluation_window, inputs_of, sample_trajectories
from ray_ddpo.common.input_images import check_inputs, with_inputs
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.prompts import Prompt, refuse_more_inputs
from ray_ddpo.common.run_storage.run_folder import weights_here
from ray_ddpo.common.video_files import mp4
from ray_ddpo.deploy.commands.settings import differing_settings
from ray_ddpo.deploy.commands.weights.given_base import check_given
from ray_ddpo.deploy.commands.weights.given_weights import default_output, load_policy, recipe_of, refuse_output_file
from ray_ddpo.deploy.driver.components import LOADING, build_components

OUTPUT = "samples"  # default folder, in the run's


def sample(
    weights: str,
    named: str | None,
    prompts: Sequence[str],
    seed: int,
    output: str | None,
    overrides: list[str],
    inputs: Mapping[str, str | list[str] | None] | None = None,
) -> Iterator[Path]:
    """Sample one image per prompt and yield the path of each as it is written, of a clip after its poster's.

    Args:
        weights: a run's folder, or a LoRA's file or folder.
        named: the recipe to use; by default the run's own.
        prompts: one an image.
        seed: of the first image; each further image has the next one.
        output: the folder for the images; by default `samples` in the run's folder.
        overrides: of the recipe.
        inputs: the files `image` (one or several) and `mask` that an editing family reads beside each prompt.

    Raises:
        ValueError: There are no weights or there is no recipe, or the input images are not those that the family reads.
    """
    recipe = recipe_of([weights], named, overrides)
    folder = Path(output) if output else default_output([weights], OUTPUT)
    refuse_output_file(folder)
    with weights_here(weights) as path:
        policy = load_policy(recipe, path)
    edited = _edited(policy, prompts, {name: path for name, path in (inputs or {}).items() if path})
    components = build_components(recipe, used=LOADING)
    check_given([weights], named, components.policy.loaded_base("sampler"), overrides)
    for line in differing_settings([weights], components.resolved()):
        print_line(line)
    folder.mkdir(parents=True, exist_ok=True)
    sampling = recipe.held_out_sampling
    print_cut_prompts(policy.text_readers(), prompts, sampling, policy.guided_above)
    window = evaluation_window(sampling)
    for index, prompt in enumerate(prompts):
        of_prompt = inputs_of(policy, edited[index : index + 1])
        trajectory = sample_trajectories(policy, [prompt], [seed + index], sampling, window, inputs=of_prompt)
        path = folder / f"{index:03d}-{_file_name(prompt)}-seed{seed + index}.png"
        if path.exists():
            print_line(f"{path} was there and is replaced")
        sampled = decoded(policy, trajectory, [prompt])[0]
        Image.fromarray(poster(sampled)).save(path)
        yield path
        if is_clip(sampled):
            path.with_suffix(".mp4").write_bytes(mp4(sampled, policy.frame_rate))
            yield path.with_suffix(".mp4")


def _edited(policy: Policy, texts: Sequence[str], files: dict[str, str | list[str]]) -> list[Prompt]:
    """Return the prompts with their input images. Raise ValueError if the family reads others than are given."""
    if sorted(files) != sorted(policy.reads_inputs):
        reads = " and ".join(f"--{name}" for name in policy.reads_inputs) or "neither --image nor --mask"
        given = "".join(f" --{name}" for name in files) or " none of them"
        raise ValueError(f"{type(policy).__name__} takes {reads}, and was given{given}")
    if not files:
        return [Prompt(text) for text in texts]
    metadata = with_inputs(dict(files), {name: name for name in files}, Path())
    check_inputs([metadata], " and ".join(f"--{name}" for name in files))
    prompts = [Prompt(text, metadata) for text in texts]
    refuse_more_inputs(prompts, policy.most_inputs, type(policy).__name__)
    return prompts


def _file_name(prompt: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in prompt)[:60]
