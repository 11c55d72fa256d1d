"""Asks a server for objects and calls of tools by instructor and Pydantic AI, and prints what they give as JSON.

Arguments: the URL of the API, a model whose chat template tells tools, and a question.
"""

# ruff: noqa: T201

import json
import sys
from collections.abc import Iterator
from typing import Any, Literal

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

url, model, question = sys.argv[1:]
MOST, SEED, SEEDS = 200, 5, 12


class Trip(BaseModel):
    model_config = ConfigDict(json_schema_extra={"x-guidance": {"whitespace_flexible": False}})

    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


def with_instructor() -> Iterator[tuple[str, Any]]:
    import instructor
    from instructor import Mode

    asked: dict[str, Any] = dict(model=model, messages=[{"role": "user", "content": question}], response_model=Trip)
    asked |= dict(max_tokens=MOST, seed=SEED, max_retries=0)
    for name, mode in (("object", Mode.JSON_SCHEMA), ("call", Mode.TOOLS)):
        made = instructor.from_openai(OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode).chat.completions
        yield name, made.create(**asked).model_dump()
        *_, last = made.create_partial(**asked)
        yield f"{name}, streamed", last.model_dump()


def with_pydantic_ai() -> Iterator[tuple[str, Any]]:
    from pydantic_ai import Agent, NativeOutput, Tool
    from pydantic_ai.messages import ToolReturnPart
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    chat = OpenAIChatModel(model, provider=OpenAIProvider(openai_client=client))
    settings: Any = dict(max_tokens=MOST, seed=SEED)
    agent: Any = Agent(chat, output_type=NativeOutput(Trip), model_settings=settings, retries=0)
    yield "object", agent.run_sync(question).output.model_dump()
    yield "object, streamed", agent.run_stream_sync(question).get_output().model_dump()

    called: list[Any] = []

    def weather(place: Trip) -> str:
        called.append(place.model_dump())
        return "rain"

    async def once(_: Any, tool: Any) -> Any:
        return None if called else tool

    # The answer is a call, too: a model without sense calls one or the other.
    settings |= dict(parallel_tool_calls=False)
    agent = Agent(chat, output_type=Trip, tools=[Tool(weather, prepare=once)], model_settings=settings, retries=0)
    for seed in range(SEEDS):
        run = agent.run_sync(question, model_settings={"seed": seed})
        if called:
            results = [p.content for m in run.all_messages() for p in m.parts if isinstance(p, ToolReturnPart)]
            yield "tools", [*called, results[0], run.output.model_dump()]
            break


print(json.dumps({kind.__name__: dict(kind()) for kind in (with_instructor, with_pydantic_ai)}))
