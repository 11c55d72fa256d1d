"""Chat templates that nobody vouches for: they are rendered in other processes, which end when one takes too much.

Nothing ends a loop of Jinja in a thread of the server, or takes back what it has allocated.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lorarep_runtime.device.process import limit_memory
from lorarep_runtime.device.process_pool import ProcessPool
from lorarep_runtime.errors import Exhausted, InvalidArgument, first_line

PROCESSES = 2
RENDER_SECONDS = 3.0
"""Longest time of a rendering; most take a millisecond."""
RENDER_BYTES = 512 << 20
"""Most memory of a rendering."""
MAX_CHARACTERS = 8 << 20
"""Longest text of a template, and longest one that it may make."""
MAX_CALLERS = 2 * PROCESSES
"""Most callers that wait for a process or its answer. Each holds a thread of the server, which has others."""
WAITING_SECONDS = 0.25
"""Longest time that a caller waits to be one of these."""
REFUSED_SECONDS = 60.0
"""Time for which a conversation that has taken too much, and longer ones, are not given to their template again."""

_processes = ProcessPool(__name__, "serve", PROCESSES)
_places = threading.BoundedSemaphore(MAX_CALLERS)


class _Size(NamedTuple):
    """A conversation's size, for a template."""

    key: bytes
    """SHA-256 of the template and its other variables."""
    messages: int
    """Their number."""
    characters: int
    """Of all of them as JSON."""

    def is_at_least(self, other: _Size) -> bool:
        """Whether a template that has taken too much for the other would take no less for this one."""
        return self.key == other.key and self.messages >= other.messages and self.characters >= other.characters


_refused: dict[_Size, float] = {}
"""Until when conversations of at least a size are refused. They are few: each has taken seconds."""


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The text of a conversation as a template (Jinja) writes it, up to where the next answer begins.

    Args:
        template: of any origin.
        messages: each with "role" and "content".
        variables: others of the template by name, such as "eos_token", as JSON has them; and, as `transformers` has
            them, `add_generation_prompt`, which is true if it is not there, and `continue_final_message`.

    Raises:
        InvalidArgument: the template refuses the messages, takes too much time or memory, or has done so a while ago
            for messages that were no longer.
        Exhausted: others take all the time there is.
    """
    if len(template) > MAX_CHARACTERS:
        raise InvalidArgument(f"the chat template has over {MAX_CHARACTERS} characters", field="prompt.chat")
    key = hashlib.sha256(template.encode(errors="surrogatepass") + b"\0" + json.dumps(variables).encode()).digest()
    size = _Size(key, len(messages), len(json.dumps(list(messages))))
    _check(size)
    if not _places.acquire(timeout=WAITING_SECONDS):
        raise Exhausted("chat templates take all the time there is", field="prompt.chat", retry_after=1.0)
    try:
        answer = _render(size, [template, list(messages), dict(variables)])
    finally:
        _places.release()
    if "error" in answer:
        raise InvalidArgument(f"the chat template refuses it: {answer['error']}", field="prompt.chat")
    return answer["text"]


def _check(size: _Size) -> None:
    """Raises InvalidArgument if the template has taken too much a while ago, for no longer a conversation."""
    now = time.monotonic()
    seconds = max((until - now for other, until in list(_refused.items()) if size.is_at_least(other)), default=0.0)
    if seconds > 0:
        raise InvalidArgument(
            f"the chat template took over {RENDER_SECONDS:g} s or {RENDER_BYTES} bytes for a conversation that was no "
            f"longer, and is not rendered for {seconds:.0f} s",
            field="prompt.chat",
        )


def _render(size: _Size, question: object) -> dict[str, str]:
    """The answer of the next process that is free. Raises as `render`."""
    with _processes.taken() as ask:
        _check(size)  # another caller's rendering may have ended meanwhile
        answer = ask(question)
    if answer is None:
        now = time.monotonic()
        for old in [old for old, until in list(_refused.items()) if until <= now]:
            _refused.pop(old, None)
        _refused[size] = now + REFUSED_SECONDS
        raise InvalidArgument(
            f"the chat template takes over {RENDER_SECONDS:g} s or {RENDER_BYTES} bytes", field="prompt.chat"
        )
    return answer


def serve() -> None:
    """Renders what the lines of standard input ask for, until its end. A process does nothing else."""
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory(RENDER_BYTES)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        template, messages, variables = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)  # its signal ends the process
        try:
            (text,), _ = render_jinja_template(
                conversations=[messages], chat_template=template, **{"add_generation_prompt": True, **variables}
            )
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"it makes over {MAX_CHARACTERS} characters")
            answer = {"text": text}
        except Exception as error:  # of any class: the template is foreign
            answer = {"error": first_line(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)
