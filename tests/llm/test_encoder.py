"""The text encoder against transformers and sentence-transformers, on the real all-MiniLM-L6-v2."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from trackrec.fetch import fetch
from trackrec.llm.encoder import TextEncoder

TEXTS = [
    "Likes slow films.",
    "Prefers war epics of the 1960s, and dislikes comedies.",
    "",
    "Ünïcode — 映画が好き",
    "a " * 300,
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    return fetch("all-minilm-l6-v2")


def encoded(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    found = dict(encoder.encode(encoder.token_ids(texts)))
    return np.stack([found[number] for number in range(len(texts))])


def test_mean_pooling_is_sentence_transformers(minilm: Path) -> None:
    ours = encoded(TextEncoder(minilm, pooling="mean", dtype="float32"), TEXTS[:4])
    theirs = SentenceTransformer(str(minilm), device="cpu").encode(TEXTS[:4])
    assert ours.shape == (4, 384)
    # Theirs have length one.
    np.testing.assert_allclose(ours / np.linalg.norm(ours, axis=1, keepdims=True), theirs, atol=1e-5)


def test_cls_pooling_is_the_first_tokens_state(minilm: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(minilm)(TEXTS[1], return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(minilm)(**tokens).last_hidden_state[0, 0].numpy()
    [found] = encoded(TextEncoder(minilm, pooling="cls", dtype="float32"), [TEXTS[1]])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_vector_does_not_depend_on_its_batch(minilm: Path) -> None:
    together = encoded(TextEncoder(minilm, pooling="mean", dtype="float32"), TEXTS)
    alone = encoded(TextEncoder(minilm, pooling="mean", dtype="float32", batch_tokens=1), TEXTS)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_batches_are_of_alike_lengths_and_hold_no_more_tokens_than_allowed(minilm: Path) -> None:
    encoder = TextEncoder(minilm, pooling="mean", dtype="float32", batch_tokens=40)
    lengths = [3, 30, 4, 12, 11, 5]
    batches = list(encoder._batches(lengths))
    assert batches == [[1], [3, 4, 5], [2, 0]]


def test_a_long_text_is_cut_and_keeps_its_last_special_token(minilm: Path) -> None:
    encoder = TextEncoder(minilm, pooling="cls", dtype="float32")
    long = "word " * 700
    [ids] = encoder.token_ids([long])
    assert len(ids) > encoder.limit == 512
    [found] = encoded(encoder, [long])
    with torch.inference_mode():
        states = encoder.model(input_ids=torch.tensor([[*ids[:511], ids[-1]]])).last_hidden_state
    np.testing.assert_allclose(found, states[0, 0].numpy(), atol=1e-5)


def test_the_tokenizers_limit_counts_where_it_is_lower(minilm: Path, tmp_path: Path) -> None:
    """RoBERTa has two positions more than tokens it can read, and its tokenizer knows."""
    shutil.copytree(minilm, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path / "model")
    encoder = TextEncoder(tmp_path / "model", pooling="mean", dtype="float32")
    assert encoder.limit == 16
    assert encoded(encoder, ["word " * 40]).shape == (1, 384)
