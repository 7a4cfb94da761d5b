"""The S-DPO loss against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trackrec.align.sdpo import SoftmaxDPOLoss, implicit_rewards, preference_accuracy, reward_margin

# By hand, β = 0.5: Δ = policy - reference = (2, 0, -2); β (Δ_d - Δ_p) = (-1, -2);
# Σ exp = e^-1 + e^-2 = 0.3678794 + 0.1353353 = 0.5032147; loss = log(1 + 0.5032147) = 0.4076060.
POLICY = [-10.0, -13.0, -22.0]
REFERENCE = [-12.0, -13.0, -20.0]
LOSS = 0.4076060


def test_three_numbers_by_hand() -> None:
    loss = SoftmaxDPOLoss(beta=0.5)(torch.tensor([POLICY]), torch.tensor([REFERENCE]))
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(LOSS, abs=1e-6)


def test_gradient_by_hand() -> None:
    """dL/dgap_d = exp(gap_d) / (1 + Σ exp), by hand 0.2447285 and 0.0900306, times β; the chosen minus their sum."""
    policy = torch.tensor([POLICY], requires_grad=True)
    SoftmaxDPOLoss(beta=0.5)(policy, torch.tensor([REFERENCE])).sum().backward()
    expected = torch.tensor([[-0.3347591 / 2, 0.2447285 / 2, 0.0900306 / 2]])
    torch.testing.assert_close(policy.grad, expected, atol=1e-6, rtol=0)


def test_where_policy_is_reference_it_is_log_of_n() -> None:
    logprobs = torch.randn(4, 10)
    loss = SoftmaxDPOLoss(beta=0.1)(logprobs, logprobs)
    torch.testing.assert_close(loss, torch.full((4,), math.log(10)))  # log(1 + 9)


def test_the_sum_runs_over_one_example_not_over_the_batch() -> None:
    """An example's loss does not depend on what else is in its batch (defect 3 of the authors' released script)."""
    loss = SoftmaxDPOLoss(beta=0.5)
    other = [[-3.0, -1.0, -400.0], [0.0, 50.0, 7.0]]
    batch = loss(torch.tensor([POLICY, *other]), torch.tensor([REFERENCE, [0.0] * 3, [0.0] * 3]))
    assert batch.shape == (3,)
    assert batch[0].item() == pytest.approx(LOSS, abs=1e-6)


@pytest.mark.parametrize("gap", [1e4, -1e4, 1e6, -1e6])
def test_any_gap_is_finite(gap: float) -> None:
    policy = torch.tensor([[gap, 0.0, 0.0]], requires_grad=True)
    loss = SoftmaxDPOLoss(beta=1.0)(policy, torch.zeros(1, 3))
    loss.sum().backward()
    # Far ahead: nothing to learn. Far behind: log 2 + gap, a slope of -1 on the chosen and of 1/2 on each rejected.
    expected, slope = (0.0, [0.0, 0.0, 0.0]) if gap > 0 else (-gap + math.log(2), [-1.0, 0.5, 0.5])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert policy.grad is not None
    assert policy.grad[0].tolist() == pytest.approx(slope)


def test_absent_rejected_do_not_count() -> None:
    """A padded row gives the loss and the gradient of the row without padding, whatever the padding holds."""
    present = torch.tensor([[True, True, True, False, False]])
    policy = torch.tensor([[*POLICY, 1e4, -1e4]], requires_grad=True)
    loss = SoftmaxDPOLoss(beta=0.5)(policy, torch.tensor([[*REFERENCE, 0.0, 0.0]]), present)
    loss.sum().backward()
    assert loss.item() == pytest.approx(LOSS, abs=1e-6)
    assert policy.grad is not None
    assert policy.grad[0, 3:].tolist() == [0.0, 0.0]
    assert policy.grad.isfinite().all()


def test_with_one_rejected_it_is_dpo() -> None:
    policy, reference = torch.randn(5, 2), torch.randn(5, 2)
    margin = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    torch.testing.assert_close(SoftmaxDPOLoss(0.1)(policy, reference), -torch.sigmoid(0.1 * margin).log())


@given(
    deltas=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=12),
    beta=st.floats(0.01, 2),
    shift=st.floats(-100, 100, width=32),
)
def test_it_is_equation_4(deltas: list[float], beta: float, shift: float) -> None:
    """Against eq. 4 in double precision with the exponentials scaled by hand; a common shift of Δ changes nothing."""
    gaps = [beta * (d - deltas[0]) for d in deltas[1:]]
    top = max(gaps)
    log_sum = top + math.log(sum(math.exp(g - top) for g in gaps))
    expected = max(log_sum, 0) + math.log1p(math.exp(-abs(log_sum)))
    policy = torch.tensor([deltas], dtype=torch.float32)
    for reference in (torch.zeros_like(policy), torch.full_like(policy, shift)):
        found = SoftmaxDPOLoss(beta)(policy, reference).item()
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-3)


def test_measures_by_hand() -> None:
    """β = 0.5, Δ = (2, 0, -2) and (0, 1, -1, absent): rewards (1, 0, -1) and (0, .5, -.5)."""
    present = torch.tensor([[True, True, True, False], [True, True, True, False]])
    policy = torch.tensor([[*POLICY, 7.0], [0.0, 1.0, -1.0, -7.0]])
    rewards = implicit_rewards(policy, torch.tensor([[*REFERENCE, 0.0], [0.0] * 4]), beta=0.5)
    assert rewards[:, :3].tolist() == [[1.0, 0.0, -1.0], [0.0, 0.5, -0.5]]
    assert reward_margin(rewards, present).tolist() == [1.5, 0.0]
    assert preference_accuracy(rewards, present).tolist() == [1.0, 0.5]
    assert preference_accuracy(torch.zeros(1, 4), present[:1]).tolist() == [0.0]
