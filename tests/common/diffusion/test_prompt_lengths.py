"""Prompts that are too long for a text encoder: which ones, where they are cut, and which become equal."""

from pathlib import Path
from typing import Any

import pytest

from ray_ddpo import cli
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.prompt_lengths import cut_prompts_in_words, print_cut_prompts
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.accepted_page import assert_accepted
from tests.tiny_families import MAKERS, policy_table

# Each letter is a token; CLIP's tokenizers here read 6 letters, T5's 12 tokens with spaces and its end.
PROMPTS = ["a cat", "abcdef", "abcdefg", "abcdefghijklmnop", "abcdefghijklmnopq"]
EXPECTED = {
    "stable_diffusion": {"text_encoder": (8, 3)},
    "sd_inpainting": {"text_encoder": (8, 3)},
    "sdxl": {"text_encoder": (8, 3), "text_encoder_2": (8, 3)},
    "sd3": {"text_encoder": (8, 3), "text_encoder_2": (8, 3), "text_encoder_3": (12, 2)},
    "flux": {"text_encoder": (8, 3), "text_encoder_2": (12, 2)},
    "flux_kontext": {"text_encoder": (8, 3), "text_encoder_2": (12, 2)},
    "qwen_image": {"text_encoder": (12, 2)},
    "qwen_image_edit": {"text_encoder": (12, 2)},
    "qwen_image_edit_plus": {"text_encoder": (12, 2)},
    "flux2": {"text_encoder": (12, 2)},
    "flux2_klein": {"text_encoder": (12, 2)},
    "flux2_edit": {"text_encoder": (12, 2)},
    "flux2_klein_edit": {"text_encoder": (12, 2)},
    "z_image": {"text_encoder": (12, 2)},  # behind the template
    "hunyuan_image": {"text_encoder": (12, 2), "text_encoder_2": (128, 0)},
    "lumina2": {"text_encoder": (13, 2)},
    "sana": {"text_encoder": (13, 2)},
    "pixart_sigma": {"text_encoder": (12, 2)},
    "wan": {"text_encoder": (12, 2)},
    "wan22": {"text_encoder": (12, 2)},
    "wan22_i2v": {"text_encoder": (12, 2)},
    "wan_ti2v": {"text_encoder": (12, 2)},
    "ltx": {"text_encoder": (12, 2)},
}


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize("family", EXPECTED)  # a Wan from images reads 512 tokens
def test_each_text_encoder_says_how_many_it_cuts_and_where(family: str, tmp_path: Path) -> None:
    config = build(POLICIES, policy_table(family, MAKERS[family](tmp_path / "model")), "policy")
    policy = config.load("cpu", SamplingTable(num_steps=4), "sampler")
    readers = policy.text_readers()
    for reader in readers:  # what diffusers' own pipelines compare
        whole = [reader.tokenizer(text, padding="longest").input_ids for text in PROMPTS]
        cut = [len(tokens) > reader.length for tokens in whole]
        assert (reader.length, sum(cut)) == EXPECTED[family][reader.name]
    assert [reader.name for reader in readers] == list(EXPECTED[family])
    said = cut_prompts_in_words(readers, PROMPTS, SamplingTable(negative_prompt="n" * 20)) or ""
    length, cuts = EXPECTED[family]["text_encoder"]
    first, end = ("abcdefg", "abcdef") if length == 8 else ("abcdefghijklmnop", "abcdefghijkl")  # no special tokens
    if config.text_parts["text_encoder"][1].endswith("T5EncoderModel"):
        end = "abcdefghij"  # with the place of a space and the end of a text
    assert said.startswith(
        f"prompts: {cuts} of 5 are longer than a text encoder reads; text_encoder reads {length} tokens and cuts {cuts}, "
        f"the first, '{first}', after '{end}'"
    )
    assert "\n" not in said
    last = readers[-1]
    if "T5" in config.text_parts[last.name][1] and last.length == 12:  # the place of a space, ten letters and the end
        assert "cuts 2, the first, 'abcdefghijklmnop', after 'abcdefghij'" in said
    same = 3 if family in ("stable_diffusion", "sd_inpainting", "sdxl") else 2
    assert f"{same} are read as another one is" in said
    more = {"sana": 1, "lumina2": 2}.get(family, 0)  # of the instruction, which a negative prompt does not follow
    assert f"reads {length + more} tokens and cuts sampling.negative_prompt after '{'n' * (len(end) + more)}'" in said
    for count in (length + more - (len(end) < length) * (length - len(end)), len(end) + more + 1):
        said = cut_prompts_in_words(readers, ["a cat"], SamplingTable(negative_prompt="n" * count))
        assert (said is None) == (count <= len(end) + more)
    assert cut_prompts_in_words(readers, ["a cat", "A cat"], SamplingTable(negative_prompt="few")) is None, (
        "equal, and not by what was cut off"
    )


def test_the_start_of_a_run_says_it_in_one_line(tables: dict, tmp_path: Path, capfd: Any) -> None:
    import tomli_w

    texts = {"name": "texts", "texts": ["cat", "a very long prompt indeed", "a very long prompt too"]}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps({**tables, "rounds": 1, "prompts": texts}))
    assert cli.main(["train", str(tmp_path / "recipe.toml"), "--serial"]) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("prompts: ")]
    assert line == (
        "prompts: 2 of 3 are longer than a text encoder reads; text_encoder reads 8 tokens and cuts 2, the first, "
        "'a very long prompt indeed', after 'a very l'; 2 are read as another one is: those that end with "
        "'…a very long prompt indeed' and '…a very long prompt too' are one to the model"
    )
    assert_accepted("prompts longer than a text encoder reads")


def test_a_negative_prompt_without_guidance_is_said_to_have_no_effect(tiny_model: Path) -> None:
    config = build(POLICIES, policy_table("stable_diffusion", tiny_model), "policy")
    sampling = SamplingTable(num_steps=4, guidance_scale=1, negative_prompt="blurred and long")
    said = cut_prompts_in_words(config.load("cpu", sampling, "sampler").text_readers(), ["cat"], sampling)
    assert said == "prompts: sampling.negative_prompt has no effect, sampling.guidance_scale 1 is not above 1"
    assert_accepted("`sampling.negative_prompt` where `guidance_scale` is not above 1")


def test_a_prompt_with_the_mark_of_an_input_image_is_refused(tmp_path: Path) -> None:
    model, sampling = MAKERS["qwen_image_edit"](tmp_path), SamplingTable(num_steps=2)
    policy = build(POLICIES, policy_table("qwen_image_edit", model), "policy").load("cpu", sampling, "sampler")
    marked, refused = "a <|image_pad|> cat", "the prompt .* stands for an input image in what the text encoder reads"
    with pytest.raises(ValueError, match=refused):
        print_cut_prompts(policy.text_readers(), ["a cat", marked], sampling)
    with pytest.raises(ValueError, match=refused):
        print_cut_prompts(policy.text_readers(), ["a cat"], sampling.model_copy(update={"negative_prompt": marked}))
    with pytest.raises(ValueError, match=refused):
        policy.encode([marked])
