"""The knowledge encoder: RecCoTs to dense vectors (paper 3.6, eq. 7), by any BERT-family model of transformers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from trackrec.llm.models import device, torch_dtype

Pooling = Literal["mean", "cls"]


class TextEncoder:
    """e = Encoder(text): [n, width] float32 from n texts.

    Texts are encoded in batches of alike lengths, so that little is padding; a vector does not depend on its batch, up
    to rounding.

    Args:
        model: a Hugging Face directory with an encoder and its tokenizer.
        pooling: mean over the tokens, or the first token's state.
        batch_tokens: the most tokens, padding included, in one batch.
    """

    def __init__(self, model: Path, *, pooling: Pooling, dtype: str = "auto", batch_tokens: int = 2048) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        loaded: Any = AutoModel.from_pretrained(
            model, dtype=torch_dtype(dtype), local_files_only=True, use_safetensors=True
        )
        self.model = loaded.to(device()).eval()
        self.pooling = pooling
        self.batch_tokens = batch_tokens
        self.width = int(self.model.config.hidden_size)
        # RoBERTa has more positions than tokens it can read; its tokenizer says how many those are.
        self.limit = min(int(self.tokenizer.model_max_length), int(self.model.config.max_position_embeddings))

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's tokens, not cut: one of more than `limit` tokens loses its end in `encode`."""
        ids: list[list[int]] = self.tokenizer(list(texts), verbose=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[list[int]]) -> Iterator[tuple[int, np.ndarray]]:
        """Each text's index and vector, as they are finished: the longest first, so that what does not fit in memory
        fails at once."""
        # The end of the special tokens is kept where a text is cut.
        kept = [ids if len(ids) <= self.limit else [*ids[: self.limit - 1], ids[-1]] for ids in token_ids]
        for batch in self._batches([len(ids) for ids in kept]):
            longest = max(len(kept[i]) for i in batch)
            padded = [kept[i] + [self.tokenizer.pad_token_id] * (longest - len(kept[i])) for i in batch]
            mask = torch.arange(longest) < torch.tensor([[len(kept[i])] for i in batch])
            ids, mask = torch.tensor(padded, device=self.model.device), mask.to(self.model.device)
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
            yield from zip(batch, self._pool(states, mask).cpu().numpy(), strict=True)

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """[B, width] from states [B, S, width] and mask [B, S]."""
        if self.pooling == "cls":
            return states[:, 0]
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch
