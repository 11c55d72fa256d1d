"""What an adapter has for the model's head and embedding: LoRA, DoRA, whole weights, and rows of single tokens.

PEFT's config says a part: `target_modules`, `modules_to_save`, `trainable_token_indices`, `ensure_weight_tying`. The
header of the weights says the rest. Beside an adapter of a base whose vocabulary was resized, PEFT saves the base's own
weights, under these paths (`peft.utils.save_and_load`, PEFT 0.21):

    P                           of a module P that the adapter leaves alone
    P.base_layer                of one with LoRA
    P.token_adapter.base_layer  of one with rows of single tokens
    P.original_module           of one that is saved whole; that is at P, and once more at P.modules_to_save
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorarep_runtime.adapters.peft_config import FILE_PREFIX, AdapterConfig
from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, shown
from lorarep_runtime.model.form import EMBEDDING, HEAD, ROWS, End, Ends, Form

MAX_NEW_TOKENS, MAX_FOREIGN_TOKENS = 1 << 16, 1 << 11
"""Most tokens by which the vocabulary of an adapter is larger than the base's: if the operator names it, and if not."""
UNREAD_WEIGHTS = 2
"""Whole weights of a head or an embedding that a file may have beside those that matter, at most."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a file's tensors, by their names without PEFT's prefix."""


class EndEntries:
    """An adapter's entries for the head and the embedding of a base.

    Args:
        config: the adapter's.
        ends: the base's, as far as adapters may adapt them.
        shapes: of the file's tensors. Before the header is known there are none: then the entries are those that the
            config promises, for the base's own vocabulary.

    Raises:
        FailedPrecondition, InvalidArgument: naming the field that cannot be served.
    """

    def __init__(self, config: AdapterConfig, ends: Ends, shapes: Shapes) -> None:
        self._config = config
        self._ends = ends
        self._shapes = shapes
        self._paths = {position: end.path for position, end in ends}
        self._targeted = {p for p, path in self._paths.items() if config.targets_end(path)}
        self._saved = {p for p, path in self._paths.items() if any(path.endswith(s) for s in config.modules_to_save)}
        if ends.tied and config.ensure_weight_tying:
            if config.ties(config.modules_to_save):
                self._saved = {*self._paths}
            elif config.ties(config.target_modules):
                self._targeted = {*self._paths}
        self._targeted -= self._saved
        self._lists = self._lists_of_ends()
        self._check_saved()

    def entries(self, most_new_tokens: int) -> dict[tuple[int, str], Form]:
        """The entries, by position and the path that the file has them under.

        Args:
            most_new_tokens: by which the adapter's vocabulary may be larger than the base's.

        Raises:
            FailedPrecondition: the vocabulary is larger, or some of its weights are not in the file.
        """
        found: dict[tuple[int, str], Form] = {}
        for position, end in self._ends:
            tokens = self._vocabulary(end, most_new_tokens)
            whole = end.path if position in self._saved else self._base_weight(position)
            if whole is not None:
                # The base's own is most probably as it is, but for new rows. Others are taken for others.
                first = 0 if position in self._saved else min(tokens, end.tokens)
                found[position, whole] = _rows(tokens, end, range(first, tokens))
            elif tokens > end.tokens:
                raise FailedPrecondition(
                    f"is missing in the file, which has {tokens} tokens where the base has {end.tokens}: save the "
                    "adapter with save_embedding_layers=True",
                    field=f"{FILE_PREFIX}{end.path}.weight",
                )
            if position in self._lists:
                found[position, f"{self._lists[position][0]}.token_adapter"] = self._listed(position, tokens, end)
            if position in self._targeted:
                found[position, end.path] = form = self._adapted(position, tokens, end)
                if form.has_c and (tokens != end.tokens or position in self._lists):
                    raise FailedPrecondition(
                        f"adapts {end.path}, of which the adapter has rows itself: train with use_dora=False",
                        field="use_dora",
                    )
        if found and self._config.alora_invocation_tokens:
            raise FailedPrecondition(
                f"begins within a sequence, and {min(found)[1]} is adapted for all of it: train without that",
                field="alora_invocation_tokens",
            )
        return found

    def is_unread(self, name: str) -> bool:
        """Whether a tensor, by its name without PEFT's prefix, is one that PEFT saves and does not read again."""
        if self._shapes[name][1:] not in {(end.hidden,) for _, end in self._ends}:
            return False
        for position, end in self._ends:
            is_tied = position in self._lists and self._lists[position][0] != end.path
            kinds = {
                "modules_to_save.weight": position in self._saved,
                "original_module.weight": position in self._saved,
                f"token_adapter.{ROWS}": is_tied,
            }
            if any(unread and name == f"{end.path}.{kind}" for kind, unread in kinds.items()):
                return True
        return False

    def _vocabulary(self, end: End, most_new_tokens: int) -> int:
        """Number of tokens that the file is for: not the base's only if head and embedding can both be adapted."""
        if [other.tokens for _, other in self._ends] != [end.tokens] * 2:
            return end.tokens
        name, tokens = next(self._counts(), ("", end.tokens))
        if not 0 < tokens <= end.tokens + most_new_tokens:
            raise FailedPrecondition(
                f"has {tokens} tokens, which may be up to {most_new_tokens} more than the base's {end.tokens}",
                field=f"{FILE_PREFIX}{name}",
            )
        return tokens

    def _counts(self) -> Iterator[tuple[str, int]]:
        """Tensors of the file that have a number for each token, and how many tokens that are."""
        for position, end in self._ends:
            path = end.path if position in self._saved else self._base_weight(position)
            for name, axis in (
                (f"{path}.weight", 0),
                (f"{end.path}.lora_B.weight", 0),
                (f"{end.path}.lora_embedding_A", 1),
            ):
                if len(shape := self._shapes.get(name, ())) == 2:
                    yield name, shape[axis]

    def _base_weight(self, position: int) -> str | None:
        """Where the file has what takes the place of the base's own weight of an end, if it does."""
        tied = [p for p in self._paths if p != position] if self._ends.tied else []
        for one in (position, *tied):
            path = self._paths[one]
            kinds = {
                "": one not in self._saved | self._targeted | self._lists.keys(),
                ".base_layer": one in self._targeted,
                ".token_adapter.base_layer": one in self._lists,
                ".original_module": one in self._saved,
            }
            for kind, is_there in kinds.items():
                if is_there and f"{path}{kind}.weight" in self._shapes:
                    return f"{path}{kind}"
        return None

    def _adapted(self, position: int, tokens: int, end: End) -> Form:
        """The entry of an end that is adapted by LoRA or DoRA."""
        is_embedding = position == EMBEDDING
        shape = (end.hidden, tokens) if is_embedding else (tokens, end.hidden)
        form = self._config.form(end.path, shape)
        if is_embedding and form != Form(form.rank, shape, form.has_c, has_bias=False):
            raise FailedPrecondition(
                f"name the embedding {end.path}, which is adapted by LoRA and DoRA alone", field="target_modules"
            )
        return form._replace(is_embedding=is_embedding)

    def _listed(self, position: int, tokens: int, end: End) -> Form:
        """The entry of single tokens' rows."""
        listed = self._lists[position][1]
        if max(listed) >= (tokens if self._shapes else tokens + MAX_NEW_TOKENS):
            raise FailedPrecondition(
                f"{max(listed)} is none of {tokens} tokens: if the base was resized, save the adapter with "
                "save_embedding_layers=True",
                field="trainable_token_indices",
            )
        return _rows(tokens, end, listed)

    def _lists_of_ends(self) -> dict[int, tuple[str, tuple[int, ...]]]:
        """The path under which the file has rows of single tokens of an end, and these tokens, by position."""
        lists: dict[int, tuple[str, tuple[int, ...]]] = {}
        for name, tokens in self._config.trainable_token_indices.items():
            at = [p for p, path in self._paths.items() if (path.endswith(name) if name else p == EMBEDDING)]
            if not at:
                raise FailedPrecondition(
                    f"{shown(name or 'the embedding')} is neither head nor embedding of a base on a CPU: merge the "
                    "adapter, and serve the merged model as a base",
                    field="trainable_token_indices",
                )
            lists.update((position, (self._paths[position], tokens)) for position in at)
        if both := lists.keys() & (self._saved | self._targeted):
            raise InvalidArgument(
                f"names {self._paths[min(both)]}, as target_modules or modules_to_save do",
                field="trainable_token_indices",
            )
        if self._ends.tied and EMBEDDING in lists:
            if HEAD not in lists or lists[HEAD][1] == lists[EMBEDDING][1]:
                lists[HEAD] = lists[EMBEDDING]
            elif self._config.ensure_weight_tying:
                raise InvalidArgument(
                    "has other tokens for the head than for the embedding", field="trainable_token_indices"
                )
        return lists

    def _check_saved(self) -> None:
        """Checks that all modules which the file has whole are ends."""
        for name in self._config.modules_to_save:
            if not any(path.endswith(name) for path in self._paths.values()):
                raise FailedPrecondition(
                    f"{shown(name)} is neither head nor embedding of a base on a CPU: train without it, or merge the "
                    "adapter and serve the merged model as a base",
                    field="modules_to_save",
                )


def _rows(tokens: int, end: End, rows: range | tuple[int, ...]) -> Form:
    """An entry of rows that are the adapter's own."""
    return Form(0, (tokens, end.hidden), has_c=False, has_bias=False, rows=rows)
