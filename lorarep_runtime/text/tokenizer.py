"""A model's tokenizer: prompts and chats to tokens, and tokens to text."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, first_line


class Tokenizer:
    """The tokenizer of a folder, as `transformers` loads it, and the tokens that end an answer.

    Args:
        folder: holds the tokenizer's files; a generation config and a model's config may name more tokens.

    Raises:
        FailedPrecondition: the folder has none that `transformers` can load.
    """

    def __init__(self, folder: Path) -> None:
        # Imported late: it imports torch, and a server has to listen before both are there.
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of any class: the file is foreign
            raise FailedPrecondition(
                f"transformers cannot load the one in {folder}: {first_line(error)}", field="tokenizer"
            ) from error
        self.chat_template: str | None = self._tokenizer.chat_template
        self.eos_ids: frozenset[int] = frozenset(_eos_ids(folder, self._tokenizer.eos_token_id))
        """Tokens that end an answer, as the tokenizer, the generation config or the model's config say."""

    def with_chat_template(self, template: str) -> Tokenizer:
        """A copy of the tokenizer with another chat template (Jinja)."""
        other = copy.copy(self)
        other.chat_template = template
        return other

    def encode(self, text: str, longest: int | None = None) -> list[int]:
        """Tokens of a text, with the special tokens that the tokenizer adds.

        Args:
            text: any text.
            longest: most tokens; a longer text keeps its last tokens and the special ones.

        Raises:
            InvalidArgument: there are more special tokens than that.
        """
        if longest is None:
            return list(self._tokenizer.encode(text))
        # The tokenizer's own truncation would be a setting that all threads share.
        encoded = self._tokenizer(text, return_special_tokens_mask=True)
        tokens, is_special = encoded["input_ids"], encoded["special_tokens_mask"]
        if sum(is_special) > longest:
            raise InvalidArgument(f"{longest} tokens are less than the {sum(is_special)} special ones", field="longest")
        dropped = iter(range(len(tokens) - longest))
        return [t for t, special in zip(tokens, is_special, strict=True) if special or next(dropped, None) is None]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where each token of `encode(text)` begins and ends in the text, in characters.

        Raises:
            FailedPrecondition: the tokenizer does not record that.
        """
        if not self._tokenizer.is_fast:
            raise FailedPrecondition("the tokenizer does not know where in a text its tokens are", field="offsets")
        return list(self._tokenizer(text, return_offsets_mapping=True)["offset_mapping"])

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary writes them, such as "▁the"; "" for an id that it does not have."""
        return [piece or "" for piece in self._tokenizer.convert_ids_to_tokens(list(tokens))]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation in the chat template's form, up to where the next answer begins.

        Args:
            messages: each with "role" and "content".

        Raises:
            FailedPrecondition: there is no template.
            InvalidArgument: the template refuses the messages.
        """
        if not self.chat_template:
            raise FailedPrecondition("the tokenizer has no chat template", field="prompt.chat")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # of any class: the template is foreign
            raise InvalidArgument(f"the chat template refuses it: {error}", field="prompt.chat") from error
        # The template writes the special tokens itself.
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without the special ones.

        Raises:
            FailedPrecondition: the tokenizer cannot decode them.
        """
        try:
            text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of `tokenizers`, a library in Rust, is no Exception
            raise FailedPrecondition(f"it cannot decode an answer: {error}", field="tokenizer") from error
        return str(text)

    def token_text(self, token: int) -> str:
        """Text of one token by itself, special or not; U+FFFD if it is only part of a character."""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` has a template to use."""
        return bool(self.chat_template)

    @property
    def largest_id(self) -> int:
        """The largest id of a token in the vocabulary."""
        return max(self._tokenizer.get_vocab().values())


def fits(tokenizer: Tokenizer, rows: int) -> bool:
    """Whether an embedding matrix has a row for every token of a tokenizer."""
    return tokenizer.largest_id < rows


def _eos_ids(folder: Path, own: int | None) -> Iterable[int]:
    """The end tokens that the configs of a folder name, and the tokenizer's own."""
    found: list[Any] = [own]
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            try:
                config = json.loads((folder / name).read_bytes())
                found += [config.get("eos_token_id"), (config.get("text_config") or {}).get("eos_token_id")]
            except (ValueError, AttributeError, RecursionError) as error:
                raise FailedPrecondition(str(error), field=name) from error
    for ids in found:
        yield from (token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int))
