"""The validator's two answers as token ids."""

from transformers import PreTrainedTokenizerBase


class TokenizerError(ValueError):
    """A tokenizer this project cannot score with."""


def yes_no_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids of "Yes" and "No", the answers that the recommendation prompt asks for (Figure 4).

    Raises:
        TokenizerError: one of them is not a single token, so the next token's logits cannot give P(Yes) and P(No).
    """
    ids = {word: tokenizer.encode(word, add_special_tokens=False) for word in ("Yes", "No")}
    for word, pieces in ids.items():
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
            raise TokenizerError(
                f"the tokenizer of {tokenizer.name_or_path!r} writes {word!r} as "
                f"{tokenizer.convert_ids_to_tokens(pieces)}, not as one token of its own; choose a base model whose "
                "tokenizer has it (Qwen2.5, Llama 3, SmolLM2 do)"
            )
    return ids["Yes"][0], ids["No"][0]
