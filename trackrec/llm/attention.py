"""What both kinds of prefix sharing ask of a model."""

from peft import PeftModel
from transformers import PreTrainedModel


class UnsupportedModelError(ValueError):
    """A model whose attention is not plain causal attention in every layer."""


def require_plain_causal(model: PreTrainedModel | PeftModel, instead: str) -> None:
    """Refuses a model whose attention an own one could not stand in for.

    Args:
        instead: what the user may do about it; ends the message.
    Raises:
        UnsupportedModelError: some layers use a sliding window, linear attention or soft-capped logits.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedModelError(
            f"{config.model_type} has attention other than plain causal ({', '.join(sorted(kinds))}); {instead}"
        )
