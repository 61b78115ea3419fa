"""BERTScore recall: how much of a reference text a candidate covers, by token embeddings (Zhang et al. 2020)."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ray_ddpo.common.model_files.model_hub import read_pretrained


def recall(
    reference: Float[Tensor, "R D"], candidate: Float[Tensor, "C D"], counts: Bool[Tensor, "R"]
) -> Float[Tensor, ""]:
    """Return the mean over the reference's tokens of the best cosine with a candidate's token (the paper's section 3).

    No idf weights and no rescaling. Only tokens that count are averaged over. As in the paper's code, the special
    tokens that open and close a text do not count, but can be matched.
    """
    cosines = torch.nn.functional.normalize(reference, dim=-1) @ torch.nn.functional.normalize(candidate, dim=-1).T
    return cosines.amax(dim=1)[counts].mean()


class BertScore:
    """A text encoder whose embeddings at one layer are compared."""

    def __init__(self, model: Any, tokenizer: Any, layer: int) -> None:
        layers = model.config.num_hidden_layers
        if not 1 <= layer <= layers:
            raise ValueError(f"layer {layer} of the text encoder is requested, and it has 1 to {layers}")
        self._model, self._tokenizer, self._layer = model, tokenizer, layer
        self._longest = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    def recall(self, candidates: list[str], references: list[str]) -> Float[Tensor, "B"]:
        """Return the recall of each reference by its candidate; 0 for an empty candidate. Long texts are truncated."""
        recalls = []
        for (reference, counts), (candidate, own) in zip(self._embed(references), self._embed(candidates), strict=True):
            empty = torch.zeros((), device=reference.device)
            recalls.append(recall(reference, candidate, counts) if own.any() else empty)
        return torch.stack(recalls)

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> list[tuple[Float[Tensor, "_ D"], Bool[Tensor, "_"]]]:
        """Return each text's token embeddings, and which tokens are not special."""
        tokens = self._tokenizer(
            [text.strip() for text in texts],
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(self._model.device)
        own = tokens.pop("special_tokens_mask") == 0
        there = tokens["attention_mask"].bool()
        embeddings = self._model(**tokens, output_hidden_states=True).hidden_states[self._layer].float()
        return [(embeddings[row, there[row]], own[row, there[row]]) for row in range(len(texts))]


def load_bert_score(source: str, layer: int, device: str, missing: str) -> BertScore:
    """Load the encoder in float32. Raise ValueError, which begins with `missing`, if that is not possible."""
    from transformers import AutoModel, AutoTokenizer

    def read(where: Any, local_files_only: bool) -> tuple[Any, Any, Any]:
        model, loading = AutoModel.from_pretrained(
            where,
            dtype=torch.float32,
            local_files_only=local_files_only,
            output_loading_info=True,
            trust_remote_code=False,
            weights_only=True,  # the paper's scorer is published as a pickle only
        )
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local_files_only, trust_remote_code=False)
        return model, loading, tokenizer

    model, loading, tokenizer = read_pretrained(source, read, missing)
    # The pooler comes after all layers and is not used.
    if lacking := sorted(name for name in loading["missing_keys"] if "pooler" not in name):
        raise ValueError(f"{missing} (weights are missing: {lacking[0]} and others)")
    return BertScore(model.to(device).eval().requires_grad_(False), tokenizer, layer)
