"""A tokenizer's chat template as text. Clients read it from the model's config, and need no tokenizer."""

from transformers import PreTrainedTokenizerFast

from trackrec.llm.chat import encode_chat, template_texts
from trackrec.llm.tokens import TokenizerError
from trackrec.serving.prompts import Chat, wrap


def chat_of(tokenizer: PreTrainedTokenizerFast) -> Chat:
    """The chat template's text, as `trackrec.llm.chat` encodes it, for a server that tokenises the whole as a text.

    Raises:
        TokenizerError: the tokenizer adds tokens to a text that the chat template does not have.
    """
    opening, closing = template_texts(tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    # Those that no attribute of the tokenizer names, too (`all_special_tokens`): a text writes them as well.
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    # Some templates use tokens that the tokenizer does not call special.
    special |= {str(token) for token in added if str(token).strip() and str(token) in opening + closing}
    bos = tokenizer.bos_token
    if bos and opening.startswith(bos) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        # The server's tokenizer writes it, and would write it twice.
        opening = opening.removeprefix(bos)
    chat = Chat(opening=opening, closing=closing, special_tokens=tuple(sorted(special)))
    ids = {tokenizer.convert_tokens_to_ids(token) for token in chat.special_tokens}
    served, trained = tokenizer(wrap(chat, "x"))["input_ids"], encode_chat(tokenizer, "x")
    if [i for i in served if i in ids] != [i for i in trained if i in ids]:
        raise TokenizerError(
            f"the tokenizer of {tokenizer.name_or_path!r} reads the chat template's text as "
            f"{tokenizer.convert_ids_to_tokens(served)}, but G was trained on "
            f"{tokenizer.convert_ids_to_tokens(trained)}: a server would give it other prompts; choose a base model "
            "whose chat template has the tokens that its tokenizer adds"
        )
    return chat
