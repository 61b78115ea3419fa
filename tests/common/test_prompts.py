"""Prompts from a list, a file or the user's function: sampled from a given generator, and refused if there are none."""

from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.common.prompts import PROMPTS, Prompt
from ray_ddpo.common.recipe.registry import build


def source(**table: object):
    return build(PROMPTS, table, "prompts")


def sampled(sample, count: int, seed: int = 0) -> list[Prompt]:
    generator = np.random.default_rng(seed)
    return [sample(generator) for _ in range(count)]


def test_the_animals_are_the_45_of_the_paper_by_their_bare_names() -> None:
    animals = source(name="animals").listed()
    assert len(set(animals)) == len(animals) == 45
    # Named in the paper's own figures and tables (DDPO, sections 5 and 6).
    assert {"cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer"} <= set(animals)
    assert all(animal == animal.strip().lower() and " " not in animal for animal in animals)


def test_every_animal_is_sampled_about_equally_often() -> None:
    texts = [prompt.text for prompt in sampled(source(name="animals").load(), 9000)]
    counts = [texts.count(animal) for animal in source(name="animals").listed()]
    # 200 each, and a standard deviation of 14: five of them to each side.
    assert min(counts) > 130 and max(counts) < 270


def test_texts_of_the_recipe_are_the_prompts() -> None:
    few = source(name="texts", texts=["a red cat", "dog"])
    assert few.listed() == ["a red cat", "dog"]
    assert {prompt.text for prompt in sampled(few.load(), 50)} == {"a red cat", "dog"}
    with pytest.raises(ValueError, match="prompts.texts"):
        source(name="texts", texts=[])


def test_the_same_generator_samples_the_same_prompts() -> None:
    sample = source(name="animals").load()
    assert sampled(sample, 20, seed=3) == sampled(sample, 20, seed=3) != sampled(sample, 20, seed=4)


def test_a_file_has_one_prompt_a_line_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n\n  a fox, at dusk \n", encoding="utf-8")
    file = source(name="file", path=str(tmp_path / "prompts.txt"))
    assert file.listed() == ["a red cat", "a fox, at dusk"]
    assert {prompt.text for prompt in sampled(file.load(), 50)} == {"a red cat", "a fox, at dusk"}


def test_a_path_may_begin_with_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    assert source(name="file", path="~/prompts.txt").listed() == ["a cat"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts.path is '.*nowhere.txt': there is no such file"):
        source(name="file", path=str(tmp_path / "nowhere.txt")).load()


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="prompts.txt': the file has no prompts; it needs one a line"):
        source(name="file", path=str(tmp_path / "prompts.txt")).load()


def test_a_function_may_give_a_text_or_a_text_with_what_its_reward_needs() -> None:
    (plain,) = sampled(source(name="function", path="tests.user_functions:text_prompt").load(), 1)
    assert plain.text.startswith("cat number ") and plain.metadata == {}
    (coloured,) = sampled(source(name="function", path="tests.user_functions:colour_prompt").load(), 1)
    assert coloured.text == f"a {coloured.metadata['colour']} cat"


def test_a_function_has_no_list_of_its_prompts() -> None:
    assert source(name="function", path="tests.user_functions:text_prompt").listed() is None


def test_a_function_that_gives_no_prompt_is_named_with_what_it_gave() -> None:
    sample = source(name="function", path="tests.user_functions:no_prompt").load()
    with pytest.raises(ValueError, match="tests.user_functions:no_prompt returned 7: a prompt is a text"):
        sample(np.random.default_rng(0))


def test_a_path_that_is_no_module_and_function_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts.path is 'prompts.py'"):
        source(name="function", path="prompts.py")


def test_prompts_that_are_left_out_are_never_sampled(tmp_path: Path) -> None:
    animals = source(name="animals", held_out_prompts=["bear", "deer"])
    assert len(animals.listed()) == 43 and animals.held_out() == ["bear", "deer"]
    assert not {"bear", "deer"} & {prompt.text for prompt in sampled(animals.load(), 2000)}
    (tmp_path / "few.txt").write_text("a\nb\nc\n")
    few = source(name="file", path=str(tmp_path / "few.txt"), held_out_prompts=["b"])
    assert few.listed() == ["a", "c"] and few.held_out() == ["b"]
    assert source(name="texts", texts=["a"]).held_out() == []


@pytest.mark.parametrize(("left_out", "says"), [(["unicorn"], "unicorn"), (["a", "b"], "nothing to sample")])
def test_what_cannot_be_left_out_is_said(tmp_path: Path, left_out: list[str], says: str) -> None:
    (tmp_path / "few.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=f"prompts.held_out_prompts has .*{says}"):
        source(name="file", path=str(tmp_path / "few.txt"), held_out_prompts=left_out).load()
