import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from trackrec.llm.sampling import nucleus, penalise_repetition


@pytest.mark.parametrize(
    ("top_p", "uniform", "token"),
    [
        # Tokens 3, 0, 2, 1 have .5, .3, .15, .05. At .9 the first three are inside: .95, which scales the number.
        (0.9, 0.0, 3),
        (0.9, 0.52, 3),  # .52 · .95 = .494 < .5
        (0.9, 0.53, 0),  # .5035
        (0.9, 0.84, 0),  # .798 < .8
        (0.9, 0.85, 2),  # .8075
        (0.9, 0.9999, 2),
        (1.0, 0.94, 2),
        (1.0, 0.96, 1),
        # The first token alone reaches .4; it is always inside.
        (0.4, 0.9999, 3),
    ],
)
def test_nucleus_by_hand(top_p: float, uniform: float, token: int) -> None:
    logits = torch.tensor([[0.3, 0.05, 0.15, 0.5]]).log() + 7.0
    assert nucleus(logits, top_p, torch.tensor([uniform])).tolist() == [token]


def test_nucleus_draws_in_proportion_from_transformers_own_set() -> None:
    torch.manual_seed(0)
    # The first row's nucleus is a few tokens; the second's is more than the quick path looks at.
    logits = torch.stack([torch.randn(3000) * 6, torch.randn(3000) * 0.1])
    draws = 20_000
    uniforms = (torch.arange(draws) + 0.5) / draws
    expected = TopPLogitsWarper(0.9)(torch.zeros(2, 1, dtype=torch.long), logits).softmax(-1)
    assert (expected[1] > 0).sum() > 2000
    for row in range(2):
        drawn = nucleus(logits[row].expand(draws, -1), 0.9, uniforms)
        share = torch.bincount(drawn, minlength=3000) / draws
        assert set(drawn.tolist()) == set(expected[row].nonzero()[:, 0].tolist())
        torch.testing.assert_close(share, expected[row], atol=1.5 / draws, rtol=0)


def test_rows_are_drawn_apart() -> None:
    torch.manual_seed(1)
    logits, uniforms = torch.randn(8, 3000) * torch.linspace(0.1, 5, 8)[:, None], torch.rand(8)
    together = nucleus(logits, 0.9, uniforms)
    alone = torch.cat([nucleus(logits[i : i + 1], 0.9, uniforms[i : i + 1]) for i in range(8)])
    assert together.tolist() == alone.tolist()


def test_repetition_penalty_by_hand_and_as_in_transformers() -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    penalised = penalise_repetition(logits, seen, 1.25)
    torch.testing.assert_close(penalised, torch.tensor([[1.6, -1.25, 3.0, -2.0]]))
    theirs = RepetitionPenaltyLogitsProcessor(1.25)(torch.tensor([[0, 1, 1]]), logits.clone())
    torch.testing.assert_close(penalised, theirs)
