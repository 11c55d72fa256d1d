"""vLLM's own routes beside OpenAI's: probes, the version, metrics, tokens, and adapters that come and go.

Their requests, answers and errors are vLLM's: AIBrix and vLLM's production-stack load and unload adapters by them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web
from lorarep.v1 import adapters_pb2, generation_pb2

from lorarep_runtime.errors import AlreadyExists, InvalidArgument, NotFound, TooLong
from lorarep_server.api.grpc_adapters import AdapterService
from lorarep_server.api.openai_bodies import Bodies
from lorarep_server.api.openai_errors import HTTP, error_response, json_response, retry_headers
from lorarep_server.api.openai_fields import Listed, Message, Name, UInt32
from lorarep_server.api.openai_requests import ChatMessage, ChatRequest
from lorarep_server.errors import Status
from lorarep_server.requests import messages
from lorarep_server.requests.admission import Admission
from lorarep_server.requests.frontend import Frontend
from lorarep_server.sources import split_revision

if TYPE_CHECKING:
    from lorarep_runtime.text.tokenizer import Tokenizer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

FIELDS = {
    "adapter": "lora_name",
    "name": "lora_name",
    "repository": "lora_path",
    "revision": "lora_path",
    "prompt.chat": "messages",
    "prompt.chat.template_arguments": "chat_template_kwargs",
    "prompt.chat.add_generation_prompt": "add_generation_prompt",
}
"""vLLM's names of fields, by lorarep's own, where the two differ."""
TYPES = {400: "InvalidUserInput", 404: "NotFoundError"}
"""vLLM's types of errors, by their HTTP status, for the routes of adapters."""
MODEL_ROUTES = ("/tokenize", "/detokenize")
"""Routes whose requests may name a model."""


class TokenizeRequest(Message):
    """The JSON body of a request to /tokenize: a prompt, or messages."""

    model: str = ""
    prompt: str | None = None
    messages: Listed[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """Of a prompt; by default true. A chat template writes its special tokens itself."""
    return_token_strs: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[Name, Any] = {}

    def to_prompt(self) -> generation_pb2.Prompt:
        """What is to be tokenized, in lorarep.v1's terms. Raises InvalidArgument unless it is one thing."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidArgument("one of prompt and messages has to be there", field="prompt")
        if self.prompt is not None:
            return generation_pb2.Prompt(text=self.prompt, omits_special_tokens=self.add_special_tokens is False)
        if self.add_special_tokens:
            raise InvalidArgument(
                "is not for messages: their template writes special tokens", field="add_special_tokens"
            )
        chat = ChatRequest(
            model=self.model,
            messages=self.messages or [],
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        return chat.to_prompts()[0]


class DetokenizeRequest(Message):
    """The JSON body of a request to /detokenize."""

    model: str = ""
    tokens: Listed[UInt32]


class LoadRequest(Message):
    """The JSON body of a request to /v1/load_lora_adapter."""

    lora_name: str = ""
    lora_path: str = ""
    """A repository, also with a folder of it and "@" and a revision; or what the adapters file has for the name."""
    load_inplace: bool = False
    base_model_name: str = ""
    """Has no effect."""
    is_3d_lora_weight: Literal[False] = False


class UnloadRequest(Message):
    """The JSON body of a request to /v1/unload_lora_adapter."""

    lora_name: str = ""
    lora_int_id: int | None = None
    """Has no effect."""


class VllmRoutes:
    """The handlers of the routes. They run in the event loop's thread."""

    def __init__(
        self,
        frontend: Frontend,
        adapters: AdapterService,
        admission: Admission,
        bodies: Bodies,
        is_ready: Callable[[], bool],
        scrape: Handler | None,
    ) -> None:
        """
        Args:
            is_ready: whether the server accepts calls.
            scrape: answers with metrics; None where they are not served here.
        """
        self._frontend = frontend
        self._adapters = adapters
        self._admission = admission
        self._bodies = bodies
        self._is_ready = is_ready
        self._scrape = scrape
        self._version = version("lorarep")

    def add_to(self, app: web.Application) -> None:
        """Adds all routes to an application."""
        app.router.add_get("/health", self._health)
        app.router.add_route("*", "/ping", self._health)
        app.router.add_get("/version", self._tell_version)
        if self._scrape is not None:
            app.router.add_get("/metrics", self._scrape)
        for path, work in (
            ("/tokenize", self._tokenize),
            ("/detokenize", self._detokenize),
            ("/v1/load_lora_adapter", self._load),
            ("/v1/unload_lora_adapter", self._unload),
        ):
            app.router.add_post(path, partial(self._guarded, work))

    async def _guarded(
        self, work: Callable[[web.Request], Awaitable[web.Response]], request: web.Request
    ) -> web.StreamResponse:
        async def run() -> web.Response:
            return await work(request)

        result = await self._admission.guard(f"POST {request.path}", run())
        if not isinstance(result, Status):
            return result
        if request.path in MODEL_ROUTES:
            return error_response(result, FIELDS | dict.fromkeys(("adapter", "repository", "stack"), "model"))
        return _vllm_error(result)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self._is_ready() else 503)

    async def _tell_version(self, request: web.Request) -> web.Response:
        return json_response({"version": self._version})

    async def _tokenize(self, request: web.Request) -> web.Response:
        asked = await self._bodies.read(TokenizeRequest, request)
        prompt, most = asked.to_prompt(), self._frontend.engine().max_tokens

        def work(tokenizer: Tokenizer) -> web.Response:
            tokens = list(messages.prompt_tokens(prompt, tokenizer, most))
            strings = tokenizer.pieces(tokens) if asked.return_token_strs else None
            return json_response({"count": len(tokens), "max_model_len": most, "tokens": tokens, "token_strs": strings})

        return await self._with_tokenizer(asked.model, work)

    async def _detokenize(self, request: web.Request) -> web.Response:
        asked = await self._bodies.read(DetokenizeRequest, request)
        if (count := len(asked.tokens)) > (most := self._frontend.engine().max_tokens):
            raise TooLong(f"{count} tokens are over the limit of {most}", field="tokens")
        return await self._with_tokenizer(
            asked.model,
            lambda tokenizer: json_response({"prompt": tokenizer.decode(asked.tokens, special_tokens=True)}),
        )

    async def _with_tokenizer(self, model: str, work: Callable[[Tokenizer], web.Response]) -> web.Response:
        target = await self._frontend.target(model) if model else {}
        return await self._frontend.with_tokenizer(target.get("adapters", ()), work)

    async def _load(self, request: web.Request) -> web.Response:
        asked = await self._bodies.read(LoadRequest, request)
        if not asked.lora_name or not asked.lora_path:
            raise InvalidArgument("Both 'lora_name' and 'lora_path' must be provided.")
        repository, revision = split_revision(asked.lora_path)
        load = adapters_pb2.LoadAdapterRequest(
            name=asked.lora_name, repository=repository, revision=revision, replace=asked.load_inplace
        )
        if not asked.load_inplace and await self._adapters.has(asked.lora_name):
            raise _already_loaded(asked.lora_name)
        try:
            await self._adapters.load(load)
        except AlreadyExists as error:
            raise _already_loaded(asked.lora_name) from error
        return web.Response(text=f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        asked = await self._bodies.read(UnloadRequest, request)
        if not asked.lora_name:
            raise InvalidArgument("'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await self._adapters.unload(asked.lora_name)
        except NotFound as error:
            raise NotFound(f"The lora adapter '{asked.lora_name}' cannot be found.") from error
        return web.Response(text=f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def _already_loaded(name: str) -> InvalidArgument:
    return InvalidArgument(
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True."
    )


def _vllm_error(status: Status) -> web.Response:
    """The response that reports a status of the routes of adapters, as vLLM does: the code is HTTP's."""
    http, kind, _ = HTTP.get(status.code, (500, "InternalServerError", None))
    named = status.named(FIELDS)
    body = {"message": named.text, "type": TYPES.get(http, kind), "param": named.field, "code": http}
    return json_response({"error": body}, status=http, headers=retry_headers(status))
