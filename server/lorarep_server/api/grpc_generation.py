"""lorarep.v1.GenerationService: generation, streamed or whole, and tokenization."""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lorarep.v1 import generation_pb2, generation_pb2_grpc

from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.request import Output, PromptLogprobs
from lorarep_server.requests import messages
from lorarep_server.requests.frontend import Frontend, call_context

if TYPE_CHECKING:
    from lorarep_runtime.text.tokenizer import Tokenizer


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """The RPCs of generation, over the frontend."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Any) -> generation_pb2.GenerateResponse:
        outputs: list[Output] = []
        async with self._frontend.generate(request, *call_context(context)) as (admitted, events):
            finished = None
            while finished is None:
                more, finished = await events.take()
                outputs += more
        # In a thread: each log-probability has its token decoded.
        whole = await asyncio.to_thread(messages.chunk, outputs, admitted.tokenizer)
        prompt = await asyncio.to_thread(_prompt_logprobs, outputs, admitted.tokenizer)
        end = messages.generation_finished(finished)
        return generation_pb2.GenerateResponse(
            text=whole.text,
            token_ids=whole.token_ids,
            logprobs=whole.logprobs,
            finish_reason=end.finish_reason,
            usage=end.usage,
            timings=end.timings,
            adapters=[messages.adapter_revision(info) for info in admitted.adapters],
            prompt_logprobs=prompt,
        )

    async def GenerateStream(self, request: generation_pb2.GenerateStreamRequest, context: Any) -> None:
        if not request.HasField("request"):  # JSON that was meant for Generate is an empty message here
            raise InvalidArgument("has to be set", field="request")
        # Messages are written, not yielded: a cancellation then ends this coroutine, and with it the request.
        async with self._frontend.generate(request.request, *call_context(context)) as (admitted, events):
            revisions = [messages.adapter_revision(info) for info in admitted.adapters]
            started = generation_pb2.GenerationStarted(adapters=revisions, prompt_tokens=len(admitted.prompt))
            await context.write(generation_pb2.GenerateStreamResponse(started=started))
            finished = None
            while finished is None:
                outputs, finished = await events.take()
                for part in messages.prompt_parts(outputs):
                    prompt = await asyncio.to_thread(_prompt_part, part, admitted.tokenizer)
                    await context.write(generation_pb2.GenerateStreamResponse(prompt=prompt))
                if outputs:
                    chunk = messages.chunk(outputs, admitted.tokenizer)
                    await context.write(generation_pb2.GenerateStreamResponse(chunk=chunk))
            end = messages.generation_finished(finished)
            await context.write(generation_pb2.GenerateStreamResponse(finished=end))

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Any) -> generation_pb2.TokenizeResponse:
        most = self._frontend.engine().max_tokens
        tokens = partial(messages.prompt_tokens, request.prompt, max_tokens=most)
        return generation_pb2.TokenizeResponse(token_ids=await self._frontend.with_tokenizer(request.adapters, tokens))


def _prompt_logprobs(outputs: Sequence[Output], tokenizer: Tokenizer) -> list[generation_pb2.TokenLogprob]:
    """The messages of a whole prompt's log-probabilities."""
    parts = messages.prompt_parts(outputs)
    return [messages.token_logprob(place, tokenizer) for part in parts for place in part]


def _prompt_part(part: PromptLogprobs, tokenizer: Tokenizer) -> generation_pb2.PromptPart:
    return generation_pb2.PromptPart(logprobs=[messages.token_logprob(place, tokenizer) for place in part])
