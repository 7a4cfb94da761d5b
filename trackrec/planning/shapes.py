"""A language model's shape, and what follows from it: parameters, an adapter's parameters, bytes a token."""

from collections.abc import Mapping
from typing import Any, Self

from trackrec.config import LoraSettings, Positive, Settings


class ModelShape(Settings):
    """A decoder with a gated feed-forward network, as Qwen2.5, Llama and SmolLM2 are."""

    hidden: Positive
    intermediate: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    vocabulary: Positive
    tied: bool
    # None: hidden / heads.
    head_width: Positive | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        """The shape in a Hugging Face `config.json`.

        Raises:
            ValueError: a number is missing; names it.
        """
        names = {
            "hidden": "hidden_size",
            "intermediate": "intermediate_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "vocabulary": "vocab_size",
        }
        if missing := [key for key in names.values() if not isinstance(config.get(key), int)]:
            raise ValueError(f"config.json lacks {', '.join(missing)}: no decoder that this project trains")
        return cls(
            **{name: config[key] for name, key in names.items()},
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            tied=bool(config.get("tie_word_embeddings", False)),
            head_width=config.get("head_dim"),
        )

    @property
    def query_width(self) -> int:
        return self.heads * (self.head_width or self.hidden // self.heads)

    @property
    def kv_width(self) -> int:
        return self.kv_heads * (self.head_width or self.hidden // self.heads)

    @property
    def embedding(self) -> int:
        """Weights of the embedding table."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Weights of one layer's matrices and norms."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All weights; the few thousand of biases are left out."""
        return self.embedding * (1 if self.tied else 2) + self.layers * self.layer + self.hidden

    def adapter(self, lora: LoraSettings) -> int:
        """Weights of a LoRA adapter on all linear layers: r × (inputs + outputs) of each; fewer modules have fewer."""
        attention = 2 * (self.hidden + self.query_width) + 2 * (self.hidden + self.kv_width)
        return self.layers * lora.r * (attention + 3 * (self.hidden + self.intermediate))

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token over all layers, in bfloat16."""
        return self.layers * 2 * self.kv_width * 2

    @property
    def activation_bytes(self) -> int:
        """What one layer keeps of one token for the backward pass, in bfloat16 with fused attention: the inputs of
        norms and matrices (6 × hidden, with queries and the attention's output), keys and values, and the four
        tensors of the gated network."""
        return 2 * (6 * self.hidden + 2 * self.kv_width + 4 * self.intermediate)

    @property
    def adapter_activation_bytes(self) -> int:
        """... and what LoRA adds: the float32 copy of each linear layer's input that a float32 adapter makes."""
        return 4 * (6 * self.hidden + self.intermediate)


# By the name's part that tells them, from their published config.json.
KNOWN = {
    "qwen2.5-0.5b": ModelShape(
        hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, vocabulary=151936, tied=True
    ),
    "qwen2.5-1.5b": ModelShape(
        hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, vocabulary=151936, tied=True
    ),
    "qwen2.5-7b": ModelShape(
        hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, vocabulary=152064, tied=False
    ),
    "smollm2-135m": ModelShape(
        hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152, tied=True
    ),
}


def known(name: str) -> ModelShape | None:
    """The shape of a model whose path or address says which it is."""
    return next((shape for part, shape in KNOWN.items() if part in name.lower()), None)
