"""Choosing the next token: drawn from the nucleus, or the likeliest under a repetition penalty."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The nucleus lies within the likeliest tokens nearly always; only where it does not is the whole vocabulary sorted.
_TOP = 512
# SplitMix64 (Steele, Lea, Flood 2014): its increment and its two multipliers, as signed 64-bit integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def nucleus(logits: Tensor, top_p: float | Tensor, seeds: Tensor, step: int | Tensor) -> Tensor:
    """Draws from the smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman et al. 2020).

    The token with the largest log-probability plus Gumbel noise is drawn. A token's noise follows from the row's seed,
    the step and the token alone, so neither the other rows nor the device matter, and rounding in the logits changes a
    draw only where two tokens tie within it.

    Args:
        logits: float32 [R, V], temperature already applied.
        top_p, step: one for all rows, or one a row [R].
        seeds: int64 [R].

    Returns:
        token ids [R].
    """
    probabilities = logits.softmax(-1)
    top, ids = probabilities.topk(min(_TOP, logits.shape[-1]))
    tokens = _draw(top, ids, top_p, seeds, step)
    wide = top.sum(-1) < top_p
    if top.shape[-1] < logits.shape[-1] and wide.any():
        own_p = top_p[wide] if isinstance(top_p, Tensor) else top_p
        own_step = step[wide] if isinstance(step, Tensor) else step
        tokens[wide] = _draw(*probabilities[wide].sort(descending=True), own_p, seeds[wide], own_step)
    return tokens


def keep_top(logits: Tensor, ks: Sequence[int]) -> Tensor:
    """Leaves each row its `ks` likeliest tokens (Fan et al. 2018), and those that tie with the last of them.

    Args:
        logits: [R, V].
        ks: one a row; all tokens stay where it is not positive.
    """
    limited = [row for row, k in enumerate(ks) if 0 < k < logits.shape[-1]]
    if not limited:
        return logits
    own = torch.tensor([[ks[row] - 1] for row in limited], device=logits.device)
    top = logits[limited].topk(max(ks[row] for row in limited)).values
    logits[limited] = logits[limited].masked_fill(logits[limited] < top.gather(-1, own), float("-inf"))
    return logits


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Divides a seen token's positive logit by `penalty` and multiplies a negative one (Keskar et al. 2019), as
    transformers and vLLM do: the prompt's tokens count as seen too, and the end-of-sequence token among them.

    Args:
        logits: [R, V].
        seen: bool [R, V].
        penalty: one for all rows, or one a row [R, 1].
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def gumbel(seeds: Tensor, step: int | Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise of `tokens` [R, K] at `step` in rows with `seeds` [R]: float64 [R, K], a function of the three."""
    stream = split_mix(split_mix(seeds) + step)
    bits = (split_mix(stream[:, None] + tokens) >> 11) & (2**53 - 1)
    return -((bits + 0.5) * 2.0**-53).log().neg().log()


def split_mix(state: Tensor) -> Tensor:
    """SplitMix64's output for each state: int64 of any shape, overflow wrapping round."""
    mixed = state + _INCREMENT
    # The shifts are logical ones: the mask takes away the copies of the sign.
    mixed = (mixed ^ ((mixed >> 30) & (2**34 - 1))) * _MULTIPLIERS[0]
    mixed = (mixed ^ ((mixed >> 27) & (2**37 - 1))) * _MULTIPLIERS[1]
    return mixed ^ ((mixed >> 31) & (2**33 - 1))


def _draw(ordered: Tensor, ids: Tensor, top_p: float | Tensor, seeds: Tensor, step: int | Tensor) -> Tensor:
    # A token is inside while those before it have not reached top_p, so the likeliest always is.
    inside = ordered.cumsum(-1) - ordered < (top_p[:, None] if isinstance(top_p, Tensor) else top_p)
    noisy = ordered.log() + gumbel(seeds, step, ids)
    drawn = noisy.masked_fill(~inside, float("-inf")).argmax(-1, keepdim=True)
    return ids.gather(-1, drawn).squeeze(-1)
