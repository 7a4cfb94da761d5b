"""Choosing the next token: the nucleus at a given random number, or the likeliest under a repetition penalty."""

import torch
from torch import Tensor

# The nucleus lies within the likeliest tokens nearly always; only where it does not is the whole vocabulary sorted.
_TOP = 512


def nucleus(logits: Tensor, top_p: float, uniforms: Tensor) -> Tensor:
    """Draws from the smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman et al. 2020).

    A row's token depends on that row's logits and number alone: the inverse of the cumulative distribution.

    Args:
        logits: float32 [R, V], temperature already applied.
        uniforms: [R] in [0, 1).

    Returns:
        token ids [R].
    """
    probabilities = logits.softmax(-1)
    top, ids = probabilities.topk(min(_TOP, logits.shape[-1]))
    tokens = _draw(top, ids, top_p, uniforms)
    wide = top.sum(-1) < top_p
    if top.shape[-1] < logits.shape[-1] and wide.any():
        ordered, ids = probabilities[wide].sort(descending=True, stable=True)
        tokens[wide] = _draw(ordered, ids, top_p, uniforms[wide])
    return tokens


def _draw(ordered: Tensor, ids: Tensor, top_p: float, uniforms: Tensor) -> Tensor:
    cumulative = ordered.cumsum(-1)
    # A token is inside while those before it have not reached top_p, so the likeliest always is.
    inside = (cumulative - ordered < top_p).sum(-1, keepdim=True)
    mass = cumulative.gather(-1, inside - 1)
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * mass, right=True)
    return ids.gather(-1, drawn.minimum(inside - 1)).squeeze(-1)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides a seen token's positive logit by `penalty` and multiplies a negative one (Keskar et al. 2019), as
    transformers and vLLM do: the prompt's tokens count as seen too, and the end-of-sequence token among them.

    Args:
        logits: [R, V].
        seen: bool [R, V].
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
