"""`encode` on the real all-MiniLM-L6-v2."""

from pathlib import Path

import numpy as np
import pytest

from tests.stages.decoding_inputs import contexts
from tests.tables import publish
from trackrec import storage
from trackrec.config import EncodeSettings
from trackrec.data import schema
from trackrec.fetch import fetch
from trackrec.llm.encoder import TextEncoder
from trackrec.prompts.render import shown_history
from trackrec.stages import encode


def recots(directory: Path, *rows: tuple[str, int, str]) -> Path:
    return publish(
        directory, recots=[{"context_id": name, "sample": sample, "text": text} for name, sample, text in rows]
    )


def vectors(root: Path, given: Path, **options: bool) -> dict[str, np.ndarray]:
    out = root / "vectors"
    encode.run(
        EncodeSettings(),
        recots=given,
        contexts=contexts(root / "contexts"),
        encoder=fetch("all-minilm-l6-v2"),
        vectors=out,
        **options,
    )
    return {row["context_id"]: np.array(row["vector"]) for row in schema.rows(out, "vectors")}


def directly(*texts: str) -> np.ndarray:
    encoder = TextEncoder(fetch("all-minilm-l6-v2"), pooling="mean", dtype="float32")
    return np.array(
        [vector for _, vector in sorted(encoder.encode(encoder.token_ids(texts)), key=lambda pair: pair[0])]
    )


def test_one_vector_a_context_the_mean_over_its_recots(tmp_path: Path) -> None:
    """Agg of eq. 7; equal texts count as often as they come."""
    given = recots(
        tmp_path / "r", ("c1", 0, "Likes war."), ("c0", 0, "Likes love."), ("c1", 1, "Likes war."), ("c1", 2, "No.")
    )
    found = vectors(tmp_path, given)
    war, love, no = directly("Likes war.", "Likes love.", "No.")
    assert list(found) == ["c0", "c1"]
    np.testing.assert_allclose(found["c0"], love, atol=1e-5)
    np.testing.assert_allclose(found["c1"], (2 * war + no) / 3, atol=1e-5)
    facts = storage.numbers(tmp_path / "vectors")
    assert (facts["texts"], facts["contexts"], facts["width"], facts["cut"]) == (4, 2, 384, 0)


def test_the_control_encodes_the_history_in_the_texts_place(tmp_path: Path) -> None:
    found = vectors(tmp_path, recots(tmp_path / "r", ("c2", 0, "whatever")), of_history=True)
    [context] = [row for row in schema.rows(tmp_path / "contexts", "contexts") if row["context_id"] == "c2"]
    [expected] = directly(shown_history(context["domain"], context["history"]))
    np.testing.assert_allclose(found["c2"], expected, atol=1e-5)


def test_no_recot_and_foreign_contexts_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no RecCoT to encode"):
        vectors(tmp_path, recots(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"lacks 1 of the contexts that have a RecCoT \(first: other\)"):
        vectors(tmp_path / "b", recots(tmp_path / "r", ("other", 0, "x")), of_history=True)
    assert not (tmp_path / "vectors").exists()
