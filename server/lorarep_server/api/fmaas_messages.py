"""Translation between fmaas' messages and lorarep's own. Defaults and meanings are those of vllm-tgis-adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fmaas import generation_pb2 as pb
from lorarep.v1 import generation_pb2

from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.request import Finished, FinishReason, Output, TokenLogprob
from lorarep_server.requests.messages import check_characters

if TYPE_CHECKING:
    from lorarep_runtime.text.tokenizer import Tokenizer

MAX_TOP_N = 10

FIELDS: Mapping[str, str] = {
    "adapter": "adapter_id",
    "adapters": "adapter_id",
    "repository": "adapter_id",
    "stack": "adapter_id",
    "prompt": "text",
    "prompt and max_new_tokens": "text",
    "prompt_logprobs": "input_tokens",
    "longest": "truncate_input_tokens",
    "offsets": "return_offsets",
    "stop": "stop_sequences",
    "structured_output.json_schema": "json_schema",
    "structured_output.regex": "regex",
    "structured_output.choice": "choice",
    "structured_output.grammar": "grammar",
}
"""fmaas' names of fields by lorarep's own, where the two differ."""

STOP_REASONS: Mapping[FinishReason, pb.StopReason.ValueType] = {
    FinishReason.LENGTH: pb.MAX_TOKENS,
    FinishReason.END_TOKEN: pb.EOS_TOKEN,
    FinishReason.STOP_STRING: pb.STOP_SEQUENCE,
}


def check(params: pb.Parameters, max_tokens: int) -> None:
    """Refuses parameters that the engine does not support.

    Args:
        max_tokens: most tokens that an answer can have.

    Raises:
        InvalidArgument: a parameter is malformed or not supported.
    """
    sampling, stopping, response, decoding = params.sampling, params.stopping, params.response, params.decoding
    if params.method not in pb.DecodingMethod.values():
        raise InvalidArgument(f"{params.method} is neither GREEDY nor SAMPLE", field="method")
    # 0 means unset, and 1 keeps all tokens.
    if params.method == pb.SAMPLE and sampling.typical_p not in (0, 1):
        raise InvalidArgument("is not supported", field="typical_p")
    if decoding.HasField("length_penalty") and decoding.length_penalty.decay_factor != 1:
        raise InvalidArgument("is not supported", field="length_penalty")
    if decoding.format not in pb.DecodingParameters.ResponseFormat.values():
        raise InvalidArgument(f"{decoding.format} is neither TEXT nor JSON", field="format")
    if stopping.max_new_tokens > max_tokens:
        raise InvalidArgument(f"{stopping.max_new_tokens} is over the limit of {max_tokens}", field="max_new_tokens")
    if response.top_n_tokens > MAX_TOP_N:
        raise InvalidArgument(f"{response.top_n_tokens} is over the limit of {MAX_TOP_N}", field="top_n_tokens")
    for detail in ("token_logprobs", "token_ranks", "top_n_tokens"):
        if getattr(response, detail) and not (response.input_tokens or response.generated_tokens):
            raise InvalidArgument("is for input_tokens and generated_tokens", field=detail)


def to_generate(params: pb.Parameters, text: str, **target: Any) -> generation_pb2.GenerateRequest:
    """The same request in lorarep.v1's terms, without a limit of the answer's length.

    Args:
        target: the adapters or the stack, as fields of GenerateRequest.
    """
    given, response = params.sampling, params.response
    sampling = generation_pb2.Sampling(repetition_penalty=params.decoding.repetition_penalty or None)
    temperature = given.temperature if given.HasField("temperature") else 1
    if params.method == pb.SAMPLE and temperature != 0:
        sampling.temperature = temperature
        sampling.top_k = given.top_k
        sampling.top_p = given.top_p or 1
        if given.HasField("seed"):
            sampling.seed = given.seed
    has_details = response.token_logprobs or response.token_ranks or response.top_n_tokens
    details = response.top_n_tokens if has_details else None
    return generation_pb2.GenerateRequest(
        prompt=generation_pb2.Prompt(text=text),
        sampling=sampling,
        stopping=generation_pb2.Stopping(
            min_new_tokens=params.stopping.min_new_tokens, stop=params.stopping.stop_sequences
        ),
        logprobs=details if response.generated_tokens else None,
        prompt_logprobs=details if response.input_tokens else None,
        structured_output=_form(params.decoding),
        **target,
    )


def _form(decoding: pb.DecodingParameters) -> generation_pb2.StructuredOutput | None:
    """The form of an answer, if guided decoding is asked for."""
    form = generation_pb2.StructuredOutput
    match decoding.WhichOneof("guided"):
        case "format" if decoding.format == pb.DecodingParameters.JSON:
            return form(json_object=form.AnyObject())
        case "json_schema":
            return form(json_schema=decoding.json_schema)
        case "regex":
            return form(regex=decoding.regex)
        case "choice":
            return form(choice=form.Choices(choices=decoding.choice.choices))
        case "grammar":
            return form(grammar=decoding.grammar)
    return None


class ResponseBuilder:
    """Builds the messages of one response. Each message has the count of the tokens so far."""

    def __init__(self, params: pb.Parameters, tokenizer: Tokenizer) -> None:
        self._params = params
        self._tokenizer = tokenizer
        self._count = 0
        self._last = 0
        """The last token so far."""

    def begin(
        self, request: generation_pb2.GenerateRequest, prompt: Sequence[int], outputs: Sequence[Output] = ()
    ) -> pb.GenerationResponse:
        """The first message; it describes the prompt.

        Args:
            outputs: the first ones, which have log-probabilities of the prompt if they are wanted.
        """
        response = self._params.response
        scored = [place for output in outputs for place in output.prompt_logprobs or ()]
        return pb.GenerationResponse(
            input_token_count=len(prompt),
            text=request.prompt.text if response.input_text else "",
            seed=request.sampling.seed,
            # The first token has no log-probability.
            input_tokens=self._infos(prompt, [None, *scored] if scored else ()) if response.input_tokens else (),
        )

    def part(self, outputs: Sequence[Output], finished: Finished | None) -> pb.GenerationResponse:
        """The message of the tokens that one or more steps added, with the stop reason if the request has finished."""
        message = pb.GenerationResponse(text="".join(output.text for output in outputs))
        if outputs:
            tokens = [token for output in outputs for token in output.tokens]
            self._count += len(tokens)
            self._last = tokens[-1]
            if self._params.response.generated_tokens:
                places = [place for output in outputs for place in output.logprobs]
                message.tokens.extend(self._infos(tokens, places))
        message.generated_token_count = self._count
        if finished is not None:
            self._end(message, finished)
        return message

    def time_is_up(self, held: str) -> pb.GenerationResponse:
        """The last message of a response that its time limit ended, with the text that was held back until then."""
        return pb.GenerationResponse(text=held, generated_token_count=self._count, stop_reason=pb.TIME_LIMIT)

    def _end(self, message: pb.GenerationResponse, finished: Finished) -> None:
        stopping = self._params.stopping
        message.stop_reason = STOP_REASONS[finished.reason]
        match finished.reason:
            case FinishReason.LENGTH if finished.completion_tokens != stopping.max_new_tokens:
                message.stop_reason = pb.TOKEN_LIMIT  # the prompt left fewer tokens
            case FinishReason.END_TOKEN:
                (message.stop_sequence,) = self._tokenizer.pieces([self._last])
            case FinishReason.STOP_STRING:
                message.stop_sequence = finished.stop
                if not stopping.HasField("include_stop_sequence") or stopping.include_stop_sequence:
                    message.text += finished.stop

    def _infos(self, tokens: Sequence[int], places: Sequence[TokenLogprob | None] = ()) -> list[pb.TokenInfo]:
        infos = [pb.TokenInfo(text=piece) for piece in self._tokenizer.pieces(tokens)]
        wanted = self._params.response
        for info, place in zip(infos, places, strict=False):  # there are no places if no details are wanted
            if place is None:
                continue
            if wanted.token_logprobs:
                info.logprob = place.logprob
            if wanted.token_ranks:
                info.rank = place.rank
            pieces = self._tokenizer.pieces([token for token, _ in place.top])
            for piece, (_, logprob) in zip(pieces, place.top, strict=True):
                info.top_tokens.add(text=piece, logprob=logprob if wanted.token_logprobs else None)
        return infos


def merged(parts: Sequence[pb.GenerationResponse]) -> pb.GenerationResponse:
    """The messages of one response, merged into one."""
    whole = pb.GenerationResponse()
    for part in parts:
        whole.MergeFrom(part)  # lists are joined; the later value of any other field wins
    whole.text = "".join(part.text for part in parts)
    return whole


def tokenized(request: pb.BatchedTokenizeRequest, tokenizer: Tokenizer, max_tokens: int) -> pb.BatchedTokenizeResponse:
    """The tokens of each text, special tokens included. A truncated text keeps its last tokens.

    Args:
        max_tokens: most tokens of a prompt. Texts that have more for certain are refused unless they are truncated.

    Raises:
        InvalidArgument: a text is too long.
    """
    response = pb.BatchedTokenizeResponse()
    for text in (each.text for each in request.requests):
        if not request.truncate_input_tokens:
            check_characters(len(text), tokenizer, max_tokens, "prompt")
        tokens = tokenizer.encode(text)
        spans = tokenizer.spans(text) if request.return_offsets else []
        kept = slice(-request.truncate_input_tokens or None, None)
        response.responses.add(
            token_count=len(tokens[kept]),
            tokens=tokenizer.pieces(tokens[kept]) if request.return_tokens else (),
            offsets=[pb.TokenizeResponse.Offset(start=start, end=end) for start, end in spans[kept]],
        )
    return response
