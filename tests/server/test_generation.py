"""Generation over gRPC."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from lorarep.v1 import generation_pb2 as pb

from tests.support.callers import request, stream
from tests.support.models import reference, reference_logits, stack_of
from tests.support.servers import Server
from tests.support.world import ADAPTERS, World

PROMPT = "The capital of France"
SETS = [(), ("lora",), ("dora",)]


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    """After each test all pages and references are released. A concurrent stream has the tokens that it has alone."""
    alone = server.generation.Generate(request("innocent", "dora", new_tokens=40)).token_ids
    concurrent: list[list[int]] = []

    def run() -> None:
        concurrent.append(
            [i for m in stream(server, request("innocent", "dora", new_tokens=40)) for i in m.chunk.token_ids]
        )

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    assert concurrent == [alone]
    server.wait_idle()
    (info,) = (name for name in server.metrics() if name.startswith("lorarep_lora_requests_info"))
    assert info.endswith("{running_lora_adapters=}{waiting_lora_adapters=}")


def test_answers_are_those_of_peft(server: Server, world: World) -> None:
    for names in SETS:
        ranges = ADAPTERS[names[0]]["layer_replication"] if names else None
        model = reference(world.base, world.adapters[names[0]] if names else None, stack_of(ranges))  # type: ignore[arg-type]
        answer = server.generation.Generate(request(PROMPT, *names, new_tokens=12))
        tokens = list(PROMPT.encode())
        prompt = list(server.generation.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=PROMPT))).token_ids)
        assert len(prompt) == len(tokens)
        for token in answer.token_ids:
            assert int(reference_logits(model, prompt)[-1].argmax()) == token
            prompt.append(token)


def test_concurrent_streams_are_the_answers(server: Server) -> None:
    alone = {names: server.generation.Generate(request(PROMPT, *names, new_tokens=30)) for names in SETS}

    def streamed(names: tuple[str, ...]) -> tuple[str, list[int]]:
        messages = list(stream(server, request(PROMPT, *names, new_tokens=30)))
        assert [m.WhichOneof("event") for m in messages[:: len(messages) - 1]] == ["started", "finished"]
        assert messages[0].started.prompt_tokens == len(PROMPT)
        assert [revision.name for revision in messages[0].started.adapters] == list(names)
        chunks = [m.chunk for m in messages[1:-1]]
        return "".join(c.text for c in chunks), [t for c in chunks for t in c.token_ids]

    with ThreadPoolExecutor(9) as threads:
        for names, got in zip(SETS * 3, threads.map(streamed, SETS * 3), strict=True):
            assert got == (alone[names].text, alone[names].token_ids)


def test_a_prompt_is_text_tokens_or_chat(server: Server) -> None:
    tokenize = server.generation.Tokenize
    text = tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="hi"))).token_ids
    assert tokenize(pb.TokenizeRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=text)))).token_ids == text
    chat = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
    dora = [pb.AdapterRef(name="dora")]
    # The template comes from the adapter's repository.
    templated = tokenize(pb.TokenizeRequest(prompt=chat, adapters=dora)).token_ids
    assert templated == tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="user: hi\n"))).token_ids
    answer = server.generation.Generate(request("", prompt=chat, adapters=dora))
    assert answer.usage.prompt_tokens == len(templated)
    with pytest.raises(grpc.RpcError) as error:
        tokenize(pb.TokenizeRequest(prompt=chat))
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_usage_timings_reason_and_logprobs(server: Server) -> None:
    answer = server.generation.Generate(request(PROMPT, "lora", new_tokens=5, logprobs=2))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 5)
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH
    assert answer.timings.prefill.ToNanoseconds() > 0
    assert answer.timings.decode.ToNanoseconds() > 0
    assert [place.token_id for place in answer.logprobs] == answer.token_ids
    for place in answer.logprobs:
        assert len(place.top) == 2
        assert (place.token_id, place.logprob) == (place.top[0].token_id, place.top[0].logprob)
    revision = answer.adapters[0]
    assert (revision.name, revision.repository, len(revision.commit)) == ("lora", "org/lora", 40)


def test_log_probabilities_of_a_prompt_are_those_of_transformers(server: Server, world: World) -> None:
    tokens = [37 * i % 250 for i in range(60)]
    expected = reference_logits(reference(world.base, None, stack_of(None)), tokens).log_softmax(-1)
    wanted = request(tokens, new_tokens=2, prompt_logprobs=2)
    whole = server.generation.Generate(wanted)
    assert [place.token_id for place in whole.prompt_logprobs] == tokens[1:]
    for place, row in zip(whole.prompt_logprobs, expected, strict=False):
        assert place.logprob == pytest.approx(row[place.token_id].item(), abs=1e-4)
        assert [each.logprob for each in place.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    first, prompt, *chunks, last = stream(server, wanted)
    assert (first.HasField("started"), last.HasField("finished")) == (True, True)
    assert list(prompt.prompt.logprobs) == list(whole.prompt_logprobs)
    assert all(message.HasField("chunk") for message in chunks)
    assert whole.usage.cached_tokens == 0


def test_a_bias_decides_between_tokens(server: Server) -> None:
    def answer(**sampling: Any) -> list[int]:
        return list(server.generation.Generate(request(PROMPT, sampling=pb.Sampling(**sampling))).token_ids)

    assert answer(logit_bias={65: 100}) == [65] * 12
    assert answer(allowed_token_ids=[66]) == [66] * 12
    assert 65 not in answer(logit_bias={65: -100})
    for field, value in (("logit_bias", {65: 101.0}), ("logit_bias", {272: 1.0}), ("allowed_token_ids", [272])):
        with pytest.raises(grpc.RpcError, match=field) as error:
            answer(**{field: value})
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_answer_of_unset_length_takes_what_the_prompt_leaves(server: Server) -> None:
    wanted = request([5] * 500, "lora", stopping=pb.Stopping(ignore_eos=True))
    assert server.generation.Generate(wanted).usage.completion_tokens == 512 - 500
    with pytest.raises(grpc.RpcError) as error:
        server.generation.Generate(request([5] * 512, stopping=pb.Stopping()))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stop_string_ends_a_stream_and_is_never_shown(server: Server) -> None:
    whole = server.generation.Generate(request(PROMPT, "lora", new_tokens=60)).text
    stop = whole[10:13]
    stopping = pb.Stopping(max_new_tokens=60, ignore_eos=True, stop=[stop])
    messages = list(stream(server, request(PROMPT, "lora", stopping=stopping)))
    assert messages[-1].finished.finish_reason == pb.FINISH_REASON_STOP_STRING
    assert "".join(m.chunk.text for m in messages) == whole[: whole.index(stop)]


def test_a_named_stack_without_an_adapter(server: Server, world: World) -> None:
    answer = server.generation.Generate(request([5, 6, 7], stack="deep", new_tokens=1))
    logits = reference_logits(reference(world.base, None, (0, 1, 2, 3, 2, 3, 4, 5)), [5, 6, 7])
    assert answer.token_ids == [int(logits[-1].argmax())]


def test_weights_of_adapters_are_heard(server: Server) -> None:
    refs = [pb.AdapterRef(name="lora", weight=0)]
    off = server.generation.Generate(request([5, 6, 7], adapters=refs, new_tokens=8, logprobs=0))
    on = server.generation.Generate(request([5, 6, 7], "lora", new_tokens=8, logprobs=0))
    assert [p.logprob for p in off.logprobs] != [p.logprob for p in on.logprobs]


def test_an_allowed_repository_is_loaded_on_demand(server: Server, world: World) -> None:
    name = "org/plain"
    answer = server.generation.Generate(request(PROMPT, name))
    assert answer.adapters[0].repository == name
    commit = answer.adapters[0].commit
    pinned = server.generation.Generate(request(PROMPT, f"{name}@{commit}"))
    assert (pinned.token_ids, pinned.adapters[0].commit) == (answer.token_ids, commit)


SAMPLING = [
    ("temperature", -1.0),
    ("temperature", float("nan")),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("min_p", -0.1),
    ("repetition_penalty", 0.0),
    ("presence_penalty", 3.0),
    ("frequency_penalty", float("inf")),
    ("seed", 2**64 - 1),
]


@pytest.mark.parametrize(
    ("wanted", "code", "named"),
    [
        *((request("x", sampling=pb.Sampling(**{f: v})), "INVALID_ARGUMENT", f) for f, v in SAMPLING),
        (request("x", prompt=None), "INVALID_ARGUMENT", "prompt"),
        (request([]), "INVALID_ARGUMENT", "prompt"),
        (request([1, 272]), "INVALID_ARGUMENT", "prompt"),
        (request("x", new_tokens=0), "INVALID_ARGUMENT", "max_new_tokens"),
        (request("x", new_tokens=513), "INVALID_ARGUMENT", "max_new_tokens"),
        (request("x", stopping=pb.Stopping(max_new_tokens=2, min_new_tokens=3)), "INVALID_ARGUMENT", "min_new_tokens"),
        (request("x", stopping=pb.Stopping(stop=[""])), "INVALID_ARGUMENT", "stop"),
        (request("x", stopping=pb.Stopping(stop_token_ids=[999])), "INVALID_ARGUMENT", "stop_token_ids"),
        (request("x", logprobs=21), "INVALID_ARGUMENT", "logprobs"),
        (request("x", "lora", "lora"), "INVALID_ARGUMENT", "adapters"),
        (request("x", "lora", "dora"), "INVALID_ARGUMENT", "dora"),
        (request("x", "lora", stack="deep"), "INVALID_ARGUMENT", "lora"),
        (request("x", "absent"), "NOT_FOUND", "absent"),
        (request("x", stack="absent"), "NOT_FOUND", "absent"),
        (request("x", "org/absent"), "NOT_FOUND", "org/absent"),
        (request("x", "other/lora"), "PERMISSION_DENIED", "other/lora"),
        (request("x", "org/../lora"), "INVALID_ARGUMENT", "org/.."),
    ],
    ids=lambda value: "" if isinstance(value, pb.GenerateRequest) else str(value),
)
def test_a_bad_request_is_refused_by_name(
    server: Server, world: World, wanted: pb.GenerateRequest, code: str, named: str
) -> None:
    asked = len(world.hub.asked)
    for call in (lambda: server.generation.Generate(wanted), lambda: list(stream(server, wanted))):
        with pytest.raises(grpc.RpcError) as error:
            call()
        assert (error.value.code().name, named in error.value.details()) == (code, True), error.value.details()
    if code == "PERMISSION_DENIED":
        assert len(world.hub.asked) == asked


def test_a_stream_without_a_request_is_refused_by_name(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as error:
        list(server.generation.GenerateStream(pb.GenerateStreamRequest()))
    assert (error.value.code().name, error.value.details()) == ("INVALID_ARGUMENT", "request: has to be set")


LONG = request("x", "lora", new_tokens=500)


@pytest.fixture
def ended_early(server: Server, world: World) -> Iterator[None]:
    """Asserts that the server ends a LONG stream before all its tokens."""
    total = "lorarep_completion_tokens_total"
    before = server.metrics()[total]
    with world.slow_steps():
        yield
        server.wait_idle()
    assert server.metrics()[total] - before < 500


@pytest.mark.usefixtures("ended_early")
def test_a_deadline_ends_a_stream(server: Server) -> None:
    with pytest.raises(grpc.RpcError) as error:
        list(stream(server, LONG, timeout=0.3))
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.usefixtures("ended_early")
def test_cancelling_ends_a_stream(server: Server) -> None:
    call = stream(server, LONG)
    for _ in range(3):
        next(call)
    call.cancel()
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() is grpc.StatusCode.CANCELLED


@pytest.mark.usefixtures("ended_early")
def test_a_client_that_vanishes_ends_its_stream(server: Server) -> None:
    channel = grpc.insecure_channel(server.address)
    call = channel.unary_stream(
        "/lorarep.v1.GenerationService/GenerateStream",
        request_serializer=pb.GenerateStreamRequest.SerializeToString,
        response_deserializer=pb.GenerateStreamResponse.FromString,
    )(pb.GenerateStreamRequest(request=LONG))
    next(call)
    channel.close()
