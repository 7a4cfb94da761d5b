"""Softmax-DPO (paper eq. 4): the loss, and the measures of what it does."""

import torch
from torch import Tensor, nn


class SoftmaxDPOLoss(nn.Module):
    """L = -log σ(-log Σ_d exp(β (Δ_d - Δ_p))), with Δ = log π_θ(Cot | u) - log G(Cot | u) (paper eq. 4).

    With the implicit rewards β Δ this is log(1 + Σ_d exp(β Δ_d - β Δ_p)) = -log softmax(β Δ)_p: the cross-entropy of
    picking the chosen RecCoT among its example's N. The sum runs over one example's rejected RecCoTs, never over the
    batch. With one rejected RecCoT it is DPO's loss.

    Args:
        beta: β, how dear it is to leave the reference.
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, policy: Tensor, reference: Tensor, present: Tensor | None = None) -> Tensor:
        """One loss an example, [B]; it and its gradient are finite at any gap that float32 can hold.

        Args:
            policy: log π_θ of each RecCoT, [B, N]; column 0 is the chosen one.
            reference: log G of the same, [B, N].
            present: bool [B, N], False where an example has fewer than N RecCoTs; by default all have N.
        """
        rewards = implicit_rewards(policy, reference, self.beta)
        if present is not None:
            rewards = rewards.masked_fill(~present, -torch.inf)
        return -rewards.log_softmax(dim=1)[:, 0]


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """β (log π_θ - log G) in float32, of the shape of both."""
    return beta * (policy.float() - reference.float())


def reward_margin(rewards: Tensor, present: Tensor) -> Tensor:
    """The chosen RecCoT's implicit reward less the mean of the rejected ones', [B] from [B, N]."""
    rejected = present[:, 1:]
    return rewards[:, 0] - (rewards[:, 1:] * rejected).sum(1) / rejected.sum(1)


def preference_accuracy(rewards: Tensor, present: Tensor) -> Tensor:
    """The share of an example's rejected RecCoTs whose implicit reward is below the chosen one's, [B] from [B, N].

    One half is chance. A tie counts as a loss, so a policy that is its reference has 0.
    """
    rejected = present[:, 1:]
    return ((rewards[:, 1:] < rewards[:, :1]) & rejected).sum(1) / rejected.sum(1)
