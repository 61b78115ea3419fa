"""The classifier's reward is the log-probability of the animal that the prompt names."""

import numpy as np
import pytest
import torch

from ray_ddpo.actors.rewards.animal_classifier import PROBE_FILE, AnimalClassifier, class_index
from ray_ddpo.common.image_models.linear_probe import LinearProbe, load_image_features, load_probe, save_probe
from ray_ddpo.common.prompts import Prompt

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


def test_log_prob_is_the_softmax_of_the_head():
    probe = load_probe(PROBE_FILE)
    logits = probe.logits(load_image_features()(IMAGES)).double().numpy()
    by_hand = [
        logits[i, probe.classes.index(animal)] - np.log(np.exp(logits[i]).sum())
        for i, animal in enumerate(["cat", "ant"])
    ]
    rewards = AnimalClassifier().load("cpu")(IMAGES, ["cat", "ant"], [{}, {}])
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, by_hand, rtol=1e-4)


def test_log_odds_compare_the_animal_with_all_others_together():
    probe = load_probe(PROBE_FILE)
    logits = probe.logits(load_image_features()(IMAGES)).double().numpy()
    by_hand = []
    for row, animal in zip(logits, ["cat", "ant"], strict=True):
        asked = probe.classes.index(animal)
        by_hand.append(row[asked] - np.log(np.exp(np.delete(row, asked)).sum()))
    rewards = AnimalClassifier(measure="log_odds").load("cpu")(IMAGES, ["cat", "ant"], [{}, {}])
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, by_hand, rtol=1e-4)


def test_top1_is_one_for_the_animal_named_first_and_zero_for_another():
    probe = load_probe(PROBE_FILE)
    first = probe.classes[int(probe.logits(load_image_features()(IMAGES[:1])).argmax())]
    other = next(animal for animal in probe.classes if animal != first)
    rewards = AnimalClassifier(measure="top1").load("cpu")(IMAGES[[0, 0]], [first, other], [{}, {}])
    assert rewards.tolist() == [1.0, 0.0]


def test_a_prompt_may_put_the_animal_in_a_sentence():
    assert class_index("A photo of a Cat.", ["dog", "cat"]) == 1


@pytest.mark.parametrize("prompt", ["a dragon", "", "a cat and a dog"])
def test_a_prompt_without_exactly_one_animal_is_refused_by_name(prompt):
    with pytest.raises(ValueError, match=rf"prompt '{prompt}'.*\['dog', 'cat'\]"):
        class_index(prompt, ["dog", "cat"])


def test_prompts_are_checked_before_anything_is_sampled():
    AnimalClassifier().check_prompts([Prompt("a cat"), Prompt("bear")])
    with pytest.raises(ValueError, match="prompt 'a table' names no animal"):
        AnimalClassifier().check_prompts([Prompt("a cat"), Prompt("a table")])


def test_of_a_prompt_of_10_000_characters_the_error_shows_the_beginning():
    with pytest.raises(ValueError, match="prompt 'dragons dragons .*…' names no animal") as error:
        class_index("dragons " * 1250, ["dog", "cat"])
    assert len(str(error.value)) < 300


def test_the_shipped_probe_knows_the_45_animals():
    animals = (PROBE_FILE.parents[1] / "prompt_lists" / "animals.txt").read_text().split()
    assert load_probe(PROBE_FILE).classes == animals


def test_a_probe_comes_back_from_disk_as_it_was(tmp_path):
    probe = LinearProbe(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, -0.5]), ["cat", "dog"])
    save_probe(probe, tmp_path / "probe.safetensors")
    loaded = load_probe(tmp_path / "probe.safetensors")
    assert torch.equal(loaded.weight, probe.weight) and torch.equal(loaded.bias, probe.bias)
    assert loaded.classes == ["cat", "dog"]
    # [1, 2] . [1, 1] + 0.5 and [3, 4] . [1, 1] - 0.5
    assert loaded.logits(torch.ones(1, 2)).tolist() == [[3.5, 6.5]]


def test_the_plan_counts_the_weights_that_are_loaded():
    from efficientnet_lite_pytorch import EfficientNet

    network, probe = EfficientNet.from_name("efficientnet-lite0"), load_probe(PROBE_FILE)
    values = sum(value.numel() for value in (*network.state_dict().values(), probe.weight, probe.bias))
    assert AnimalClassifier().memory_bytes == 4 * values
