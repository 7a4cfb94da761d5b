"""Log-probabilities of packed continuations, without the [B, S, V] logits."""

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trackrec.llm.packing import ATTENTION, PREFIX, Packed

# Positions whose logits are held at a time: at a vocabulary of 152,000, 512 of them are 0.3 GB in float32.
CHUNK = 512


def suffix_logprobs(model: PreTrainedModel | PeftModel, packed: Packed, chunk: int = CHUNK) -> Tensor:
    """log P(suffix | prefix), summed over a suffix's tokens: float32 [B, N], 0 where a row has fewer than N suffixes.

    The language-model head runs on the positions that predict a suffix token, `chunk` of them at a time; the backward
    pass computes each chunk's logits again, so that [chunk, V] is the most there ever is.

    Args:
        model: a causal language model that has been through `packing.enable`; its head may be tied, trained or carry
            an adapter.
    Raises:
        ValueError: it has not.
    """
    rows, columns = (packed.segment_ids > PREFIX).nonzero(as_tuple=True)
    segments = packed.segment_ids[rows, columns]
    # A suffix's first token is predicted at the prefix's last one, the others at the token before.
    is_first = packed.segment_ids[rows, columns - 1] != segments
    prefix_end = (packed.segment_ids == PREFIX).sum(1) - 1
    predictors = torch.where(is_first, prefix_end[rows], columns - 1)

    if model.config._attn_implementation != ATTENTION:
        raise ValueError("this model would let a suffix see its neighbours; call `packing.enable` on it first")
    hidden = _decoder(model)(**packed.model_inputs, use_cache=False).last_hidden_state[rows, predictors]
    targets = packed.input_ids[rows, columns]
    head = model.get_output_embeddings()
    token_logprobs = torch.cat(
        [
            checkpoint(_token_logprobs, head, states, labels, use_reentrant=False)
            for states, labels in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
    )
    suffixes = int(segments.max())
    sums = token_logprobs.new_zeros(len(packed.segment_ids) * suffixes)
    return sums.index_add(0, rows * suffixes + segments - 1, token_logprobs).view(-1, suffixes)


def _token_logprobs(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _decoder(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The model without its head, adapters in place."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(causal_lm, PreTrainedModel)
    return causal_lm.get_decoder()
