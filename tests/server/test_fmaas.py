"""fmaas.GenerationService, called by stubs of its public messages."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from fmaas import generation_pb2 as pb
from grpc_health.v1 import health_pb2
from lorarep.v1 import generation_pb2
from lorarep_server.api import fmaas_messages

from tests.support.callers import health, request
from tests.support.servers import SECONDS, Server, wait_for
from tests.support.world import World

PROMPT = "The capital of France"
SAMPLED = pb.SamplingParameters(temperature=0.9, top_k=40, top_p=0.95, seed=7)
AS_SAMPLED = generation_pb2.Sampling(temperature=SAMPLED.temperature, top_k=40, top_p=SAMPLED.top_p, seed=7)
AS_LONG = generation_pb2.Stopping(max_new_tokens=40, min_new_tokens=40)
DETAILS = pb.ResponseOptions(generated_tokens=True, token_logprobs=True, token_ranks=True, top_n_tokens=3)


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    yield
    server.wait_idle()


def parameters(new_tokens: int = 12, **fields: Any) -> pb.Parameters:
    """Parameters of a greedy answer of exactly so many tokens."""
    stopping = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, **fields.pop("stopping", {}))
    return pb.Parameters(**{"stopping": pb.StoppingCriteria(**stopping), **fields})


def batch(*texts: str, **fields: Any) -> pb.BatchedGenerationRequest:
    return pb.BatchedGenerationRequest(requests=[pb.GenerationRequest(text=text) for text in texts], **fields)


def whole(server: Server, text: str = PROMPT, **fields: Any) -> pb.GenerationResponse:
    (response,) = server.fmaas.Generate(batch(text, **fields), timeout=SECONDS).responses
    return response


def streamed(server: Server, text: str = PROMPT, **fields: Any) -> list[pb.GenerationResponse]:
    wanted = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=text), **fields)
    return list(server.fmaas.GenerateStream(wanted, timeout=SECONDS))


def test_adapters_of_different_stacks_stream_at_once_what_lorarep_generates(server: Server, world: World) -> None:
    targets: dict[str, dict[str, Any]] = {
        "lora": dict(adapters=[generation_pb2.AdapterRef(name="lora")]),
        "dora": dict(adapters=[generation_pb2.AdapterRef(name="dora")]),
        "deep": dict(stack="deep"),
        "": {},
        "org/plain": dict(adapters=[generation_pb2.AdapterRef(name="org/plain")]),  # loaded on demand
    }
    penalty = pb.DecodingParameters(repetition_penalty=1.25)
    samplings = (
        (generation_pb2.Sampling(), parameters(40)),
        (AS_SAMPLED, parameters(40, method=pb.SAMPLE, sampling=SAMPLED)),
        (generation_pb2.Sampling(repetition_penalty=1.25), parameters(40, decoding=penalty)),
    )
    asked = [(name, sampling) for name in targets for sampling in samplings]

    def stream(each: tuple[str, tuple[generation_pb2.Sampling, pb.Parameters]]) -> str:
        name, (_, params) = each
        first, *parts = streamed(server, adapter_id=name, params=params)
        assert (first.input_token_count, first.text, first.stop_reason) == (len(PROMPT), "", pb.NOT_FINISHED)
        assert first.seed == params.sampling.seed
        assert [part.stop_reason for part in parts] == [pb.NOT_FINISHED] * (len(parts) - 1) + [pb.MAX_TOKENS]
        counts = [part.generated_token_count for part in parts]
        assert counts == sorted(counts)
        assert (counts[0] < 40, counts[-1]) == (True, 40)
        return "".join(part.text for part in parts)

    with world.slow_steps(), ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(stream, asked))
    for (name, (sampling, _)), answer in zip(asked, answers, strict=True):
        fields = dict(sampling=sampling, stopping=AS_LONG, **targets[name])
        assert answer == server.generation.Generate(request(PROMPT, **fields)).text, (name, sampling)
    assert len(set(answers)) >= 2 * len(targets)


def test_the_prompts_of_a_batch_are_answered_as_each_alone(server: Server) -> None:
    texts = [f"{number} {PROMPT}" for number in range(6)]
    fields: dict[str, Any] = dict(adapter_id="lora", params=parameters(response=DETAILS))
    together = server.fmaas.Generate(batch(*texts, **fields), timeout=SECONDS).responses
    for text, response in zip(texts, together, strict=True):
        assert response.text == whole(server, text, **fields).text
        assert (response.input_token_count, response.generated_token_count) == (len(text), 12)
        assert len(response.tokens) == 12
    assert whole(server, prefix_id="lora", params=fields["params"]) == whole(server, **fields)
    assert not server.fmaas.Generate(batch(), timeout=SECONDS).responses


def test_a_prompt_that_is_refused_ends_its_batch(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as error:
        server.fmaas.Generate(batch("a", "", "b", params=parameters(400)), timeout=SECONDS)
    assert (error.value.code().name, error.value.details()) == ("INVALID_ARGUMENT", "text: has no tokens")


@pytest.mark.usefixtures("slow_steps")
def test_a_client_that_leaves_a_batch_gives_its_pages_back(server: Server) -> None:
    call = server.fmaas.Generate.future(batch(*"abcd", params=parameters(500)), timeout=SECONDS)
    wait_for(lambda: server.metrics()["lorarep_requests_running"], "the batch to run")
    call.cancel()
    server.wait_idle()


def test_details_are_of_the_tokens_that_were_generated(server: Server) -> None:
    sampling = dict(method=pb.SAMPLE, sampling=SAMPLED)
    response = whole(server, adapter_id="lora", params=parameters(response=DETAILS, **sampling))
    expected = server.generation.Generate(
        request(
            PROMPT,
            "lora",
            logprobs=20,
            sampling=AS_SAMPLED,
            stopping=generation_pb2.Stopping(max_new_tokens=12, min_new_tokens=12),
        )
    )
    ranks = set()
    for info, place in zip(response.tokens, expected.logprobs, strict=True):
        assert info.logprob == pytest.approx(place.logprob, abs=1e-5)
        likeliest = [top.token_id for top in place.top]
        assert info.rank == likeliest.index(place.token_id) + 1 if info.rank <= 20 else place.token_id not in likeliest
        assert [top.logprob for top in info.top_tokens] == pytest.approx([t.logprob for t in place.top[:3]], abs=1e-5)
        if info.rank <= 3:
            assert info.text == info.top_tokens[info.rank - 1].text
        ranks.add(info.rank)
    assert len(ranks) > 1
    bare = whole(server, adapter_id="lora", params=parameters(response=dict(generated_tokens=True), **sampling))
    assert list(bare.tokens) == [pb.TokenInfo(text=info.text) for info in response.tokens]
    _, *parts = streamed(server, adapter_id="lora", params=parameters(response=DETAILS, **sampling))
    assert [info.text for part in parts for info in part.tokens] == [info.text for info in response.tokens]
    assert not whole(server, params=parameters()).tokens


def test_the_prompt_is_given_back_where_it_is_asked_for(server: Server) -> None:
    response = whole(server, "a b", params=parameters(response=dict(input_text=True, input_tokens=True)))
    assert response.text == "a b" + whole(server, "a b", params=parameters()).text
    assert [info.text for info in response.input_tokens] == ["a", "Ġ", "b"]


@pytest.mark.parametrize("generated", [True, False])
def test_details_may_be_of_the_prompt(server: Server, generated: bool) -> None:
    wanted = dict(token_logprobs=True, token_ranks=True, top_n_tokens=3, input_tokens=True, generated_tokens=generated)
    params = parameters(response=wanted)
    expected = server.generation.Generate(request(PROMPT, "lora", prompt_logprobs=3)).prompt_logprobs
    for response in (
        whole(server, adapter_id="lora", params=params),
        next(iter(streamed(server, adapter_id="lora", params=params))),
    ):
        first, *infos = response.input_tokens
        assert first == pb.TokenInfo(text=PROMPT[0])
        for info, place in zip(infos, expected, strict=True):
            assert info.logprob == pytest.approx(place.logprob, abs=1e-5)
            assert [top.logprob for top in info.top_tokens] == pytest.approx([t.logprob for t in place.top], abs=1e-5)
            assert info.rank == 1 or info.logprob < info.top_tokens[0].logprob
    assert bool(whole(server, adapter_id="lora", params=params).tokens) == generated
    with pytest.raises(grpc.RpcError, match=r"input_tokens: .* over the limit") as error:
        server.fmaas.Generate(batch(*["x" * 400] * 170, params=params), timeout=SECONDS)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stop_is_told_and_is_the_texts_end_if_wanted(server: Server) -> None:
    text = whole(server, params=parameters(60)).text
    stop = text[10:13]
    end = text.index(stop)
    for include, expected in ((None, text[:end] + stop), (True, text[:end] + stop), (False, text[:end])):
        stopping = dict(max_new_tokens=60, stop_sequences=["never", stop], include_stop_sequence=include)
        params = pb.Parameters(stopping=pb.StoppingCriteria(**stopping))
        response = whole(server, params=params)
        assert (response.text, response.stop_reason, response.stop_sequence) == (expected, pb.STOP_SEQUENCE, stop)
        parts = streamed(server, params=params)
        assert ("".join(part.text for part in parts), parts[-1].stop_sequence) == (expected, stop)


def test_an_end_token_is_told(server: Server) -> None:
    params = pb.Parameters(method=pb.SAMPLE, sampling=pb.SamplingParameters(temperature=5, seed=1))
    response = whole(server, adapter_id="lora", params=params)
    assert (response.stop_reason, response.stop_sequence) == (pb.EOS_TOKEN, "</s>")
    assert (response.seed, response.generated_token_count < 490) == (1, True)


@pytest.mark.parametrize(("new_tokens", "reason"), [(0, pb.TOKEN_LIMIT), (512, pb.TOKEN_LIMIT), (12, pb.MAX_TOKENS)])
def test_what_the_prompt_leaves_is_the_most(server: Server, new_tokens: int, reason: int) -> None:
    """An unset limit and one over the maximum give the same answer."""
    stopping = pb.StoppingCriteria(max_new_tokens=new_tokens, min_new_tokens=12)
    response = whole(server, "a" * 500, params=pb.Parameters(stopping=stopping))
    assert (response.generated_token_count, response.stop_reason) == (12, reason)


def test_a_time_limit_ends_an_answer_with_what_there_is(server: Server, world: World) -> None:
    text = whole(server, params=parameters(490)).text
    for milliseconds in (1, 200):
        params = parameters(490, stopping=dict(time_limit_millis=milliseconds))
        with world.slow_steps():
            response = whole(server, params=params)
            first, *parts = streamed(server, params=params)
        assert first.input_token_count == response.input_token_count == len(PROMPT)
        for last, shown in ((response, response.text), (parts[-1], "".join(part.text for part in parts))):
            assert last.stop_reason == pb.TIME_LIMIT
            assert last.generated_token_count < 490
            assert text.startswith(shown)


def test_a_time_limit_gives_the_text_that_was_held_back() -> None:
    message = fmaas_messages.ResponseBuilder(pb.Parameters(), tokenizer=None).time_is_up("held")
    assert (message.text, message.stop_reason) == ("held", pb.TIME_LIMIT)


@pytest.mark.usefixtures("slow_steps")
def test_a_deadline_is_no_time_limit(server: Server) -> None:
    params = parameters(490, stopping=dict(time_limit_millis=1000 * SECONDS))
    wanted = pb.SingleGenerationRequest(request=pb.GenerationRequest(text=PROMPT), params=params)
    calls = (
        lambda: server.fmaas.Generate(batch(PROMPT, params=params), timeout=0.2),
        lambda: list(server.fmaas.GenerateStream(wanted, timeout=0.2)),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as error:
            call()
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not any("unexpected error" in line for line in server.log)


def test_a_prompt_is_cut_to_its_last_tokens(server: Server) -> None:
    response = whole(server, "x" * 600 + PROMPT, params=parameters(truncate_input_tokens=len(PROMPT)))
    assert response.text == whole(server, params=parameters()).text
    assert response.input_token_count == len(PROMPT)


def test_tokens_and_where_in_the_text_they_are(server: Server) -> None:
    def tokenized(**fields: Any) -> Any:
        texts = [pb.TokenizeRequest(text=text) for text in ("aé b", "")]
        return server.fmaas.Tokenize(pb.BatchedTokenizeRequest(requests=texts, **fields), timeout=SECONDS).responses

    first, second = tokenized(return_tokens=True, return_offsets=True, adapter_id="lora")
    assert (first.token_count, list(first.tokens)) == (5, ["a", "Ã", "©", "Ġ", "b"])
    assert [(at.start, at.end) for at in first.offsets] == [(0, 1), (1, 2), (1, 2), (2, 3), (3, 4)]
    assert (second.token_count, list(second.tokens)) == (0, [])
    first, _ = tokenized(return_tokens=True, return_offsets=True, truncate_input_tokens=2)
    assert (first.token_count, list(first.tokens)) == (2, ["Ġ", "b"])
    assert [(at.start, at.end) for at in first.offsets] == [(2, 3), (3, 4)]
    assert tokenized()[0] == pb.TokenizeResponse(token_count=5)
    assert tokenized(adapter_id="deep")[0].token_count == 5
    with pytest.raises(grpc.RpcError) as error:
        tokenized(adapter_id="absent")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert error.value.details().startswith("adapter_id: ")


def test_the_model_is_described(server: Server) -> None:
    info = server.fmaas.ModelInfo(pb.ModelInfoRequest(model_id="any"), timeout=SECONDS)
    assert (info.model_kind, info.max_sequence_length) == (pb.ModelInfoResponse.DECODER_ONLY, 512)
    assert health(server, "fmaas.GenerationService") == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        (dict(adapter_id="absent"), "NOT_FOUND", "adapter_id"),
        (dict(adapter_id="other/lora"), "PERMISSION_DENIED", "adapter_id"),
        (dict(method=2), "INVALID_ARGUMENT", "method"),
        (dict(method=1, sampling=dict(typical_p=0.5)), "INVALID_ARGUMENT", "typical_p"),
        (dict(method=1, sampling=dict(temperature=-1)), "INVALID_ARGUMENT", "temperature"),
        (dict(method=1, sampling=dict(temperature=float("nan"))), "INVALID_ARGUMENT", "temperature"),
        (dict(method=1, sampling=dict(top_p=1.5)), "INVALID_ARGUMENT", "top_p"),
        (dict(method=1, sampling=dict(seed=2**63)), "INVALID_ARGUMENT", "seed"),
        (dict(decoding=dict(repetition_penalty=-1)), "INVALID_ARGUMENT", "repetition_penalty"),
        (dict(decoding=dict(length_penalty=dict(start_index=1, decay_factor=2))), "INVALID_ARGUMENT", "length_penalty"),
        (dict(decoding=dict(format=2)), "INVALID_ARGUMENT", "format"),
        (dict(decoding=dict(json_schema="{")), "INVALID_ARGUMENT", "json_schema"),
        (dict(decoding=dict(regex="(?=a)")), "INVALID_ARGUMENT", "regex"),
        (dict(decoding=dict(choice=dict(choices=[]))), "INVALID_ARGUMENT", "choice"),
        (dict(decoding=dict(grammar="a")), "INVALID_ARGUMENT", "grammar"),
        (dict(stopping=dict(max_new_tokens=513)), "INVALID_ARGUMENT", "max_new_tokens"),
        (dict(stopping=dict(max_new_tokens=4, min_new_tokens=5)), "INVALID_ARGUMENT", "min_new_tokens"),
        (dict(stopping=dict(stop_sequences=[""])), "INVALID_ARGUMENT", "stop_sequences"),
        (dict(response=dict(token_logprobs=True)), "INVALID_ARGUMENT", "token_logprobs"),
        (dict(response=dict(token_ranks=True)), "INVALID_ARGUMENT", "token_ranks"),
        (dict(response=dict(generated_tokens=True, top_n_tokens=11)), "INVALID_ARGUMENT", "top_n_tokens"),
        (dict(text=""), "INVALID_ARGUMENT", "text"),
        (dict(text="x" * 512), "INVALID_ARGUMENT", "text"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(server: Server, fields: dict[str, Any], code: str, named: str) -> None:
    given = dict(fields)
    text, adapter = given.pop("text", PROMPT), given.pop("adapter_id", "lora")
    for ask in (whole, streamed):
        with pytest.raises(grpc.RpcError) as error:
            ask(server, text, adapter_id=adapter, params=pb.Parameters(**given))
        assert error.value.code().name == code
        assert error.value.details().startswith(f"{named}: "), error.value.details()


def test_what_says_what_is_done_anyway_is_taken(server: Server) -> None:
    neutral = parameters(
        sampling=pb.SamplingParameters(typical_p=0.5, top_k=3),  # ignored by greedy decoding
        decoding=pb.DecodingParameters(
            repetition_penalty=1,
            length_penalty=pb.DecodingParameters.LengthPenalty(start_index=3, decay_factor=1),
            format=pb.DecodingParameters.TEXT,
        ),
    )
    assert whole(server, model_id="any", params=neutral).text == whole(server, params=parameters()).text


def test_more_prompts_than_can_wait_are_refused(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as error:
        server.fmaas.Generate(batch(*["x"] * 5000), timeout=SECONDS)
    assert error.value.details().startswith("requests: ")
