import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from trackrec.llm.sampling import gumbel, keep_top, nucleus, penalise_repetition, split_mix

DRAWS = 10_000


def draw(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """`DRAWS` tokens of one row of logits, each with a seed of its own."""
    return nucleus(logits.expand(DRAWS, -1), top_p, torch.arange(DRAWS), 3)


def test_split_mix_gives_the_published_sequence() -> None:
    """The first outputs of the reference implementation for seed 1234567, whose state grows by the increment."""
    increment = 0x9E3779B97F4A7C15 - 2**64
    states = torch.tensor([1234567 + i * increment for i in range(2)])
    unsigned = [value % 2**64 for value in split_mix(states).tolist()]
    assert unsigned == [6457827717110365317, 3203168211198807973]


def test_gumbel_noise_is_gumbels_and_a_function_of_seed_step_and_token() -> None:
    noise = gumbel(torch.arange(400), 5, torch.arange(500).expand(400, -1))
    # Mean: Euler's constant. Standard deviation: pi / sqrt(6). Median: -log(log 2).
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.std() - 1.2825) < 0.01
    assert abs(noise.median() - 0.3665) < 0.01
    # Neighbouring seeds, steps and tokens are unrelated.
    other = gumbel(torch.arange(400), 6, torch.arange(500).expand(400, -1))
    for a, b in ((noise, other), (noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
    assert torch.equal(gumbel(torch.tensor([7]), 5, torch.tensor([[9, 3]]))[0], noise[7, [9, 3]])


def test_the_nucleus_by_hand() -> None:
    """Tokens 3, 0, 2, 1 have .5, .3, .15, .05. At .9 the first three are inside, and make .95."""
    logits = torch.tensor([0.3, 0.05, 0.15, 0.5]).log() + 7.0
    share = torch.bincount(draw(logits, 0.9), minlength=4) / DRAWS
    torch.testing.assert_close(share, torch.tensor([0.3, 0.0, 0.15, 0.5]) / 0.95, atol=0.02, rtol=0)
    share = torch.bincount(draw(logits, 1.0), minlength=4) / DRAWS
    torch.testing.assert_close(share, torch.tensor([0.3, 0.05, 0.15, 0.5]), atol=0.02, rtol=0)
    # The first alone reaches .4; the first two are needed for .6.
    assert set(draw(logits, 0.4).tolist()) == {3}
    assert set(draw(logits, 0.6).tolist()) == {3, 0}


def test_the_nucleus_is_transformers_own_set() -> None:
    torch.manual_seed(0)
    # The first nucleus is a few tokens; the second is more than the quick path looks at.
    for logits in (torch.randn(800) * 4, torch.randn(800) * 0.1):
        expected = TopPLogitsWarper(0.9)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1)
        drawn = draw(logits, 0.9)
        assert expected[drawn].min() > 0
        share = torch.bincount(drawn, minlength=800) / DRAWS
        # Five standard deviations of a count, and for the rarest tokens a few draws.
        assert ((share - expected).abs() <= 5 * (expected / DRAWS).sqrt() + 3 / DRAWS).all()
    assert (expected > 0).sum() > 600


def test_rows_are_drawn_apart() -> None:
    torch.manual_seed(1)
    logits, seeds = torch.randn(8, 3000) * torch.linspace(0.1, 5, 8)[:, None], torch.arange(8) * 2**59
    together = nucleus(logits, 0.9, seeds, 2)
    alone = torch.cat([nucleus(logits[i : i + 1], 0.9, seeds[i : i + 1], 2) for i in range(8)])
    assert together.tolist() == alone.tolist()
    assert together.tolist() != nucleus(logits, 0.9, seeds, 3).tolist()


def test_repetition_penalty_by_hand_and_as_in_transformers() -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    penalised = penalise_repetition(logits, seen, 1.25)
    torch.testing.assert_close(penalised, torch.tensor([[1.6, -1.25, 3.0, -2.0]]))
    theirs = RepetitionPenaltyLogitsProcessor(1.25)(torch.tensor([[0, 1, 1]]), logits.clone())
    torch.testing.assert_close(penalised, theirs)


def test_each_row_by_its_own_settings() -> None:
    """Nuclei that are wider and narrower than what is looked at first, steps and penalties of their own."""
    torch.manual_seed(1)
    logits, seeds = torch.randn(8, 3000) * torch.linspace(0.1, 5, 8)[:, None], torch.arange(8) * 2**59
    top_p, steps = torch.linspace(0.3, 1, 8), torch.arange(8) % 3
    together = nucleus(logits, top_p, seeds, steps)
    alone = [nucleus(logits[i : i + 1], float(top_p[i]), seeds[i : i + 1], int(steps[i])) for i in range(8)]
    assert together.tolist() == torch.cat(alone).tolist()
    seen, penalties = torch.rand(8, 3000) < 0.5, torch.linspace(0.5, 2, 8)[:, None]
    penalised = penalise_repetition(logits, seen, penalties)
    for i in range(8):
        torch.testing.assert_close(penalised[i], penalise_repetition(logits[i], seen[i], float(penalties[i])))


def test_the_likeliest_tokens_as_in_transformers() -> None:
    torch.manual_seed(2)
    logits, ks = torch.randn(5, 100), [0, 1, 7, -1, 100]
    kept = keep_top(logits.clone(), ks)
    for row, k in enumerate(ks):
        theirs = TopKLogitsWarper(k)(torch.zeros(1, 1), logits[row : row + 1]) if k > 0 else logits[row : row + 1]
        assert torch.equal(kept[row : row + 1], theirs)
