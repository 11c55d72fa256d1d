"""Forms of answers as llguidance's Lark grammars, made and checked in processes of their own.

A few bytes of a schema or of an expression may take minutes to compile, in native code that nothing in a thread ends.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from lorarep_runtime.device.process import limit_memory
from lorarep_runtime.device.process_pool import ProcessPool
from lorarep_runtime.errors import Exhausted, InvalidArgument, first_line
from lorarep_runtime.request import StructuredOutput
from lorarep_runtime.text.json_space import bounded_space

if TYPE_CHECKING:
    from llguidance import LLParserLimits

PROCESSES = 2
CHECK_SECONDS = 1.0
"""Most processor seconds of a check; most take a few milliseconds."""
CHECK_BYTES = 512 << 20
"""Most memory of a check."""
MAX_CALLERS = 2 * PROCESSES
"""Most callers that have a form checked or compiled. Each holds a thread of the server, which has others."""
WAITING_SECONDS = 1.0
"""Longest time that a caller waits to be one of these."""
KEPT = 256
"""Number of grammars that are kept, as most callers ask for the same form again and again."""
REFUSED_SECONDS = 60.0
"""Time for which a form that has taken too much is not checked again."""
OPTIONS = '%llguidance {"no_forcing": true}\n'
"""A mask takes away what the grammar forbids and nothing else: the model chooses the tokens of a forced text, too."""

_processes = ProcessPool(__name__, "serve", PROCESSES)
places = threading.BoundedSemaphore(MAX_CALLERS)
_known: dict[bytes, str] = {}
_refused: dict[bytes, float] = {}
"""Until when forms are refused. They are few: each has taken a second."""


def limits() -> LLParserLimits:
    """The work that a grammar may take in one step, and to begin. No thread of a mask is held for long then."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        step_max_items=10_000,
        step_lexer_fuel=50_000,
        max_lexer_states=50_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def checked_lark(form: StructuredOutput) -> str:
    """The Lark grammar of a form, which compiles in little time.

    Raises:
        InvalidArgument: it cannot be compiled, or takes too much time or memory.
        Exhausted: others take all the time there is.
    """
    key = hashlib.sha256(json.dumps([form.kind, form.text, *form.choices]).encode()).digest()
    if (lark := _known.get(key)) is not None:
        return lark
    _check_refused(key, form)
    with _processes.taken() as ask:
        _check_refused(key, form)
        answer = ask([form.kind, form.text, form.choices])
    if answer is None:
        now = time.monotonic()
        for old in [old for old, until in list(_refused.items()) if until <= now]:
            _refused.pop(old, None)
        _refused[key] = now + REFUSED_SECONDS
        raise _takes_too_much(form)
    if "error" in answer:
        raise InvalidArgument(answer["error"], field=form.field)
    _known[key] = lark = answer["lark"]
    for oldest in list(_known)[:-KEPT]:
        _known.pop(oldest, None)
    return lark


def _check_refused(key: bytes, form: StructuredOutput) -> None:
    if _refused.get(key, 0) > time.monotonic():
        raise _takes_too_much(form)


def _takes_too_much(form: StructuredOutput) -> InvalidArgument:
    return InvalidArgument(
        f"takes over {CHECK_SECONDS:g} s or {CHECK_BYTES} bytes to compile: ask for a simpler one", field=form.field
    )


def exhausted(form: StructuredOutput) -> Exhausted:
    """The error of a caller that has waited long enough for one of the places."""
    return Exhausted("forms of others take all the time there is", field=form.field, retry_after=1.0)


def serve() -> None:
    """Makes and checks the grammars of the forms in the lines of standard input, until its end.

    A process does nothing else.
    """
    from llguidance import LLMatcher, LLTokenizer

    bounds, vocabulary = limits(), LLTokenizer("byte")
    limit_memory(CHECK_BYTES)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CHECK_SECONDS)  # its signal ends the process
        try:
            lark = to_lark(*json.loads(line))
            matcher = LLMatcher(vocabulary, lark, limits=bounds, log_level=0)  # `validate_grammar` makes no lexer
            if not matcher.is_error():
                matcher.compute_bitmask()
            answer = {"error": reason(matcher.get_error())} if matcher.is_error() else {"lark": lark}
        except BaseException as failed:  # of any class, panics in Rust included: the form is foreign
            answer = {"error": first_line(failed)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)


def to_lark(kind: str, text: str, choices: list[str]) -> str:
    """The Lark grammar of a form. Raises what a malformed one makes libraries raise."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    match kind:
        case "json_schema":
            return f"{OPTIONS}start: %json {json.dumps(bounded_space(json.loads(text)))}"
        case "regex":
            (grammar,) = json.loads(LLMatcher.grammar_from_regex(text))["grammars"]
            return OPTIONS + str(grammar["lark_grammar"])
        case "choice":
            return f"{OPTIONS}start: ANSWER\nANSWER: {' | '.join(map(json.dumps, choices))}"
    if "::=" in text:  # GBNF, whose empty lines the library takes long for
        text = any_to_lark(re.sub(r"\n\s*\n", "\n", text))
    return f"{text}\n{OPTIONS}"


def reason(error: str) -> str:
    """The first line of a library's error, without the place in a grammar that callers have not written."""
    line = next((line for line in error.splitlines() if line.strip()), "cannot be compiled")
    return re.sub(r"^(at )?\d+\(\d+\): ", "", line)
