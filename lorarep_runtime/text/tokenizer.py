"""A model's tokenizer: prompts and chats to tokens, and tokens to text."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, TooLong
from lorarep_runtime.text import chat_template
from lorarep_runtime.text.foreign import (
    MAX_ADDED_TOKENS,
    MAX_TOKEN_CHARACTERS,
    Pipeline,
    foreign_code,
)
from lorarep_runtime.text.text_length import characters_of_a_token
from lorarep_runtime.text.token_bytes import TokenBytes
from lorarep_runtime.text.vocabulary_files import check_read, check_there, what_is_missing


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of an embedding's rows, as the bytes that they are in the middle of a text."""

    tokens: Sequence[bytes]
    """b"" for those that no text shows."""
    special: frozenset[int]
    """Tokens that no text shows: the special ones, and rows without a token."""
    digest: bytes
    """SHA-256 of both."""


class Tokenizer:
    """The tokenizer of a folder, as `transformers` loads it, and the tokens that end an answer.

    Args:
        folder: holds the tokenizer's files; a generation config and a model's config may name more tokens.
        of_base: whether these configs are read. An adapter is generated from with its base's.
        trusted: whether the operator vouches for the files. Their chat template is rendered in this process then.

    Raises:
        FailedPrecondition: the folder has none that `transformers` can load.
    """

    def __init__(self, folder: Path, *, of_base: bool = True, trusted: bool = True) -> None:
        # Imported late: it imports torch, and a server has to listen before both are there.
        from transformers import AutoTokenizer

        check_there(folder)
        with foreign_code(lambda error: f"{folder} {what_is_missing(folder, error)}"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_read(folder, self._tokenizer)
        self._folder = folder
        self._trusted = trusted
        self._vocabularies: dict[int, Vocabulary] = {}
        """By the number of rows. Copies with other chat templates share them."""
        template = self._tokenizer.chat_template
        self._named_templates = sorted(template) if isinstance(template, Mapping) else []
        self.chat_template: str | None = template.get("default") if isinstance(template, Mapping) else template
        """Of several named ones the default, as for `transformers`."""
        self.eos_ids: frozenset[int] = frozenset(_eos_ids(folder if of_base else None, self._tokenizer.eos_token_id))
        """Tokens that end an answer, as the tokenizer, the generation config or the model's config say."""

    def with_chat_template(self, template: str, *, trusted: bool = True) -> Tokenizer:
        """A copy of the tokenizer with another chat template (Jinja), which the operator may vouch for or not."""
        other = copy.copy(self)
        other.chat_template, other._trusted = template, trusted
        return other

    def encode(self, text: str, longest: int | None = None, *, adds_special_tokens: bool = True) -> list[int]:
        """Tokens of a text, with the special tokens that the tokenizer adds.

        Args:
            text: any text.
            adds_special_tokens: whether it adds any.
            longest: most tokens; a longer text keeps its last tokens and the special ones.

        Raises:
            InvalidArgument: there are more special tokens than that.
        """
        with foreign_code("it cannot encode a text"):
            if longest is None:
                return list(self._tokenizer.encode(text, add_special_tokens=adds_special_tokens))
            # The tokenizer's own truncation would be a setting that all threads share.
            encoded = self._tokenizer(text, add_special_tokens=adds_special_tokens, return_special_tokens_mask=True)
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
        with foreign_code("it cannot encode a text"):
            return list(self._tokenizer(text, return_offsets_mapping=True)["offset_mapping"])

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary writes them, such as "▁the"; "" for an id that it does not have."""
        with foreign_code("it cannot name its tokens"):
            return [piece or "" for piece in self._tokenizer.convert_ids_to_tokens(list(tokens))]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        most_characters: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        *,
        asks_for_answer: bool = True,
        continues_last: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Tokens of a conversation in the chat template's form, up to where the next answer begins.

        Args:
            messages: each with "role" and "content", and perhaps others that templates read, such as "name". The role
                "developer", OpenAI's newer one, is "system" to a template that does not name it.
            most_characters: of the text that the template writes; None is any number.
            arguments: further variables of the template, as JSON has them.
            asks_for_answer: whether the template writes what an answer begins with (`add_generation_prompt`).
            continues_last: whether the text ends within the last message (`continue_final_message`).
            tools: functions that the model may call, as OpenAI has them.

        Raises:
            FailedPrecondition: there is no template, or of several none is the default.
            TooLong: the template writes more.
            InvalidArgument: there are no messages, or the template refuses them; or an argument has the name of what
                the template has anyway.
            LorarepError: as `chat_template.render`, where nobody vouches for the template.
        """
        if not self.chat_template:
            named = f' named "default", only {self._named_templates}' if self._named_templates else ""
            raise FailedPrecondition(f"the tokenizer has no chat template{named}", field="prompt.chat")
        if not messages:
            raise InvalidArgument("has no messages", field="prompt.chat")
        if asks_for_answer and continues_last:
            raise InvalidArgument("contradicts continue_final_message", field="prompt.chat.add_generation_prompt")
        if "developer" not in self.chat_template:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        ends: dict[str, Any] = {"add_generation_prompt": asks_for_answer, "continue_final_message": continues_last}
        if tools:
            ends["tools"] = list(tools)
        arguments = arguments or {}
        if taken := arguments.keys() & self._template_variables:
            raise InvalidArgument(f"{min(taken)} cannot be set", field="prompt.chat.template_arguments")
        with foreign_code("the chat template refuses it", InvalidArgument, "prompt.chat"):
            if self._trusted:
                text = self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.chat_template,
                    tokenize=False,
                    **ends,
                    **arguments,
                )
            else:
                variables = {**self._tokenizer.special_tokens_map, **ends, **arguments}
                text = chat_template.render(self.chat_template, messages, variables)
        if most_characters is not None and len(text) > most_characters:
            raise TooLong(
                f"the chat template makes {len(text)} characters of it, over the limit of {most_characters}",
                field="prompt.chat",
            )
        with foreign_code("it cannot encode a chat"):
            # The template writes the special tokens itself.
            return list(self._tokenizer.encode(text, add_special_tokens=False))

    @property
    def _template_variables(self) -> set[str]:
        """Names that arguments of a chat template cannot have: its own variables, and `transformers`' parameters."""
        parameters = inspect.signature(self._tokenizer.apply_chat_template).parameters
        return {"messages", *parameters, *self._tokenizer.special_tokens_map}

    def decode(self, tokens: Sequence[int], *, special_tokens: bool = False) -> str:
        """Text of tokens, with or without the special ones.

        Raises:
            FailedPrecondition: the tokenizer cannot decode them.
        """
        with foreign_code("it cannot decode an answer"):
            text = self._tokenizer.decode(
                list(tokens), skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False
            )
        return str(text)

    @cached_property
    def special_texts(self) -> Mapping[int, str]:
        """The texts of special tokens, by their ids."""
        return {number: text for text, number in self._special_tokens.items()}

    def special_token(self, text: str) -> int | None:
        """The special token that a text is, if it is one. `decode` leaves them out."""
        return self._special_tokens.get(text)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of tokens, which need no decoding."""
        with foreign_code("it cannot say how it decodes"):
            return TokenBytes(self._tokenizer, self._special_tokens.values())

    def vocabulary(self, rows: int) -> Vocabulary:
        """The tokens of an embedding of so many rows.

        Raises:
            FailedPrecondition: the decoder does not say what text they are.
        """
        if rows not in self._vocabularies:
            tokens = self.token_bytes.of_all(rows)
            special = frozenset(token for token, text in enumerate(tokens) if not text)
            digest = sha256(repr(tokens).encode()).digest()
            self._vocabularies[rows] = Vocabulary(tokens, special, digest)
        return self._vocabularies[rows]

    @cached_property
    def _special_tokens(self) -> Mapping[str, int]:
        with foreign_code("it cannot name its special tokens"):
            added = self._tokenizer.added_tokens_decoder
            return {token.content: number for number, token in added.items() if token.special}

    def token_text(self, token: int) -> str:
        """Text of one token by itself, special or not; U+FFFD if it is only part of a character."""
        with foreign_code("it cannot decode a token"):
            return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` has a template to use."""
        return bool(self.chat_template)

    def adapters_own(self, folder: Path, rows: int, *, trusted: bool) -> Tokenizer:
        """The tokenizer of an adapter of this tokenizer's base.

        Args:
            folder: holds the adapter's files.
            rows: of the base's embedding.
            trusted: whether the operator vouches for the files. What others publish may compute only what the base's
                does: nobody could end it in the middle of a token.

        Raises:
            FailedPrecondition: it cannot be loaded, computes something else, or has other tokens in the base's place.
        """
        if not trusted:
            self._pipeline.check(folder)
        own = Tokenizer(folder, of_base=False, trusted=trusted)
        if not trusted:
            self._check_added(own)
        if not fits(own, rows) and not self._is_part_of(own, rows):
            raise FailedPrecondition(
                f"its tokens go up to {own.largest_id}, are not the base's, and the base has rows for {rows}",
                field="tokenizer",
            )
        return own

    @cached_property
    def _pipeline(self) -> Pipeline:
        serialized = self._tokenizer.backend_tokenizer.to_str() if self._tokenizer.is_fast else None
        return Pipeline(self._folder, serialized)

    def _check_added(self, own: Tokenizer) -> None:
        """Checks the class of an untrusted adapter's tokenizer, and the number and lengths of the tokens it adds."""
        if not own._tokenizer.is_fast and type(own._tokenizer) is not type(self._tokenizer):
            raise FailedPrecondition(f"{type(own._tokenizer).__name__} is not the base's class", field="tokenizer")
        added = own._tokenizer.get_added_vocab().keys() - self._tokenizer.get_added_vocab().keys()
        if len(added) > MAX_ADDED_TOKENS or any(len(token) > MAX_TOKEN_CHARACTERS for token in added):
            raise FailedPrecondition(
                f"it adds {len(added)} tokens, the longest of {max(map(len, added))} characters; "
                f"{MAX_ADDED_TOKENS} of {MAX_TOKEN_CHARACTERS} are possible",
                field="tokenizer",
            )

    def _is_part_of(self, other: Tokenizer, rows: int) -> bool:
        """Whether another tokenizer has this one's tokens for the rows of an embedding, and further ones."""
        ids = range(min(rows, self.largest_id + 1))
        return bool(self._tokenizer.convert_ids_to_tokens(ids) == other._tokenizer.convert_ids_to_tokens(ids))

    def most_characters(self, tokens: int) -> int | None:
        """The most characters that a text of so many tokens can have; None where that may be any number."""
        return None if self._characters_of_a_token is None else tokens * self._characters_of_a_token

    @cached_property
    def _characters_of_a_token(self) -> int | None:
        if not self._tokenizer.is_fast:
            return None
        with foreign_code("it cannot say what it leaves out of a text"):
            return characters_of_a_token(self._tokenizer.backend_tokenizer)

    @cached_property
    def largest_id(self) -> int:
        """The largest id of a token in the vocabulary."""
        return max(self._tokenizer.get_vocab().values())


def fits(tokenizer: Tokenizer, rows: int) -> bool:
    """Whether an embedding matrix has a row for every token of a tokenizer."""
    return tokenizer.largest_id < rows


def _eos_ids(folder: Path | None, own: int | None) -> Iterable[int]:
    """The end tokens that the configs of a folder name, and the tokenizer's own."""
    found: list[Any] = [own]
    for name in ("generation_config.json", "config.json"):
        if folder is not None and (folder / name).exists():
            try:
                config = json.loads((folder / name).read_bytes())
                found += [config.get("eos_token_id"), (config.get("text_config") or {}).get("eos_token_id")]
            except (ValueError, AttributeError, RecursionError) as error:
                raise FailedPrecondition(str(error), field=name) from error
    for ids in found:
        yield from (token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int))
