"""BERTScore recall: numbers worked out by hand, the published formula step by step, and a real encoder's tokens."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_ddpo.common.image_models.bert_score import BertScore, load_bert_score, recall
from tests.tiny_vlm import SMALL, save_tiny_encoder, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def score(folder: Path) -> BertScore:
    return load_bert_score(str(folder), 2, "cpu", "missing")


def test_recall_is_the_mean_of_each_reference_tokens_best_cosine() -> None:
    reference = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    candidate = torch.tensor([[5.0, 0.0], [3.0, 4.0]])
    counts = torch.tensor([True, True, True])
    # Best: (2,0)·(5,0) = 1; (0,3) with (3,4) = 4/5; (1,1) with (3,4) = 7/(5√2).
    assert recall(reference, candidate, counts).item() == pytest.approx((1 + 0.8 + 7 / (5 * math.sqrt(2))) / 3)


def test_a_token_that_opens_or_closes_does_not_count_and_a_worse_match_takes_nothing_away() -> None:
    reference = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    candidate = torch.tensor([[1.0, 0.0]])
    assert recall(reference, candidate, torch.tensor([False, True])).item() == 1
    more = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert recall(reference, more, torch.tensor([False, True])).item() == 1


def test_without_anything_alike_it_is_negative_and_not_cut_at_zero() -> None:
    assert recall(torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.0]]), torch.tensor([True])).item() == -1


def published(embeddings: list[np.ndarray], own: list[np.ndarray]) -> float:
    """The recall of the paper's code for one pair, reference first: idf 1 for a text's own tokens, 0 for the others."""
    reference, candidate = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in embeddings)
    idf = own[0].astype(float)
    scale = idf / idf.sum()
    return sum(
        scale[row] * max(float(reference[row] @ candidate[column]) for column in range(len(candidate)))
        for row in range(len(reference))
    )


def test_a_batch_gives_what_the_published_formula_gives_pair_by_pair(folder: Path, score: BertScore) -> None:
    from transformers import BertModel

    model, tokenizer = BertModel.from_pretrained(folder).eval(), tiny_tokenizer("<s> $A </s>")
    pairs = [
        ("a cat sitting on the grass", "the image contains a cat"),
        ("dog", "the image contains two red birds and a horse"),
        ("one", "one"),
    ]
    for layer in (1, 2):
        wanted = []
        for candidate, reference in pairs:
            embeddings, own = [], []
            for text in (reference, candidate):
                ids = tokenizer(text, return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
                embeddings.append(hidden[layer][0].numpy())
                own.append(np.array([False, *[True] * (ids.shape[1] - 2), False]))
            wanted.append(published(embeddings, own))
        found = load_bert_score(str(folder), layer, "cpu", "missing").recall(*map(list, zip(*pairs, strict=True)))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5)
        assert len(set(found.tolist())) == 3


def test_a_text_says_all_of_itself_and_less_of_another(score: BertScore) -> None:
    same, other = score.recall(["a red cat", "two birds on grass"], ["a red cat", "a red cat"]).tolist()
    assert same == pytest.approx(1, abs=1e-6) and other < 0.99


@pytest.mark.parametrize("nothing", ["", "  \n"])
def test_a_text_that_says_nothing_recalls_nothing(score: BertScore, nothing: str) -> None:
    assert score.recall([nothing, "cat"], ["a cat", "a cat"])[0] == 0


def test_a_reference_without_a_word_has_no_recall(score: BertScore) -> None:
    assert math.isnan(score.recall(["cat"], [""])[0])


def test_a_long_text_loses_its_end(score: BertScore) -> None:
    kept = " ".join(["cat"] * 46)  # 48 positions, two of them for the tokens around a text
    for long in (" ".join(["cat"] * 2_500), f"{kept} horse"):
        assert score.recall(["a cat"], [long]) == score.recall(["a cat"], [kept])
    assert score.recall(["a cat"], [kept.replace("cat", "horse", 1)]) != score.recall(["a cat"], [kept])


def test_a_layer_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="layer 3 of the text encoder is requested, and it has 1 to 2"):
        load_bert_score(str(folder), 3, "cpu", "missing")


def test_missing_files_and_missing_weights_are_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"^it is needed \("):
        load_bert_score(str(tmp_path / "nowhere"), 1, "cpu", "it is needed")
    folder = save_tiny_encoder(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="it is needed .weights are missing: encoder.layer.1.output.dense.weight"):
        load_bert_score(str(folder), 1, "cpu", "it is needed")


def test_the_encoder_of_the_papers_code_is_of_a_kind_that_runs(tmp_path: Path) -> None:
    from transformers import DebertaConfig, DebertaModel

    kind = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    torch.manual_seed(0)
    config = DebertaConfig(**SMALL, **kind, vocab_size=64, type_vocab_size=0, max_position_embeddings=48)
    DebertaModel(config).save_pretrained(tmp_path)
    tiny_tokenizer("<s> $A </s>").save_pretrained(tmp_path)
    found = load_bert_score(str(tmp_path), 2, "cpu", "missing").recall(["a cat", "two dogs"], ["a cat", "a cat"])
    assert found[0].item() == pytest.approx(1, abs=1e-6) and found[1] < 0.999
