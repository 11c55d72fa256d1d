"""vLLM's routes, as its clients and the controllers of AIBrix and production-stack call them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from lorarep.v1 import generation_pb2 as pb
from transformers import AutoTokenizer

from tests.support.servers import SECONDS, Server, serving
from tests.support.world import World


@pytest.fixture(scope="module")
def started(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    """A server with tokens, the adapter dora of a flag and lora of the adapters file, and metrics beside the API; and
    the status of its health while it was starting.
    """
    folder = tmp_path_factory.mktemp("secured")
    (folder / "tokens").write_text("generate g\nadminister a\n")
    (folder / "adapters").write_text(f"lora: {{repository: {world.adapters['lora']}}}\n")
    (folder / "base").write_text("hold")
    flags = [*world.flags(), "--openai-listen=127.0.0.1:0", "--openai-metrics", "--ignore-unknown-fields"]
    flags += [f"--token-file={folder / 'tokens'}", "--adapter=dora=org/dora", f"--adapters-file={folder / 'adapters'}"]
    flags += ["--allow-repository=org/*"]
    with serving(flags, {**world.env, "LORAREP_FAILPOINTS": str(folder)}) as server:
        early, _ = call(server, "/health", token="")
        (folder / "base").unlink()
        yield server.wait_ready(), early


@pytest.fixture(scope="module")
def secured(started: tuple[Server, int]) -> Server:
    return started[0]


def call(server: Server, path: str, body: Any = None, token: str = "a", method: str | None = None) -> tuple[int, str]:
    """The status and the text of a response."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    url = f"http://127.0.0.1:{server.openai_port}{path}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, headers, method=method), timeout=SECONDS
        ) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error as response:
            return response.code, response.read().decode()


def error_of(answer: tuple[int, str]) -> tuple[int, dict[str, Any]]:
    return answer[0], json.loads(answer[1])["error"]


def test_probes_need_no_token_and_the_rest_does(secured: Server) -> None:
    for path, method in (("/health", "GET"), ("/ping", "GET"), ("/ping", "POST")):
        assert call(secured, path, token="", method=method) == (200, "")
    for path in ("/version", "/metrics", "/v1/models"):
        assert call(secured, path, token="")[0] == 401
        assert call(secured, path, token="g")[0] == 200
    assert json.loads(call(secured, "/version")[1]).keys() == {"version"}
    assert "lorarep_requests_running" in call(secured, "/metrics")[1]
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert call(secured, path, {"lora_name": "x"}, token="")[0] == 401
        assert call(secured, path, {"lora_name": "x"}, token="g")[0] == 403


def test_metrics_are_there_only_where_the_operator_wants_them(server: Server) -> None:
    assert call(server, "/metrics", token="")[0] == 404


def test_a_server_that_starts_is_not_healthy(started: tuple[Server, int]) -> None:
    assert started[1] == 503


def test_adapters_come_and_go_as_in_vllm(secured: Server) -> None:
    def models() -> dict[str, Any]:
        return {model["id"]: model for model in json.loads(call(secured, "/v1/models")[1])["data"]}

    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    wanted = {"lora_name": "mine", "lora_path": "org/plain@main"}
    assert call(secured, load, wanted) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert (models()["mine"]["root"], models()["mine"]["parent"]) == ("org/plain", "org/base")
    assert models()["mine"]["max_model_len"] == 512
    status, error = error_of(call(secured, load, wanted))
    assert (status, error["type"], error["param"], error["code"]) == (400, "InvalidUserInput", None, 400)
    assert error["message"] == (
        "The lora adapter 'mine' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True."
    )
    assert call(secured, load, {**wanted, "lora_path": "org/dora", "load_inplace": True})[0] == 200
    assert models()["mine"]["root"] == "org/dora"
    assert call(secured, unload, {"lora_name": "mine"}) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    status, error = error_of(call(secured, unload, {"lora_name": "mine", "lora_int_id": 1}))
    assert (status, error["type"], error["code"]) == (404, "NotFoundError", 404)
    assert error["message"] == "The lora adapter 'mine' cannot be found."


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"lora_name": "x"}, 400, None),
        ({"lora_path": "org/plain"}, 400, None),
        ({"lora_name": "x", "lora_path": "org/none"}, 404, "lora_path"),
        ({"lora_name": "x", "lora_path": "other/plain"}, 403, "lora_path"),
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "org/plain@nothing"}, 404, "lora_path"),
        ({"lora_name": "x,y", "lora_path": "org/plain"}, 400, "lora_name"),
        ({"lora_name": "lora", "lora_path": "org/plain", "load_inplace": True}, 400, "lora_path"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_refused_by_name(
    secured: Server, body: dict[str, Any], status: int, param: str | None
) -> None:
    got, error = error_of(call(secured, "/v1/load_lora_adapter", body))
    assert (got, error["code"], error["param"]) == (status, status, param), error


def test_an_entry_of_the_adapters_file_stays(secured: Server, world: World) -> None:
    assert call(secured, "/v1/unload_lora_adapter", {"lora_name": "lora"})[0] == 400
    again = {"lora_name": "lora", "lora_path": str(world.adapters["lora"]), "load_inplace": True}
    assert call(secured, "/v1/load_lora_adapter", again)[0] == 200


def test_tokens_are_those_of_transformers(server: Server, world: World) -> None:
    own = AutoTokenizer.from_pretrained(world.base)
    text = "Größe 🦜</s>x"
    for adds in (True, False, None):
        answer = json.loads(call(server, "/tokenize", {"prompt": text, "add_special_tokens": adds}, token="")[1])
        assert answer["tokens"] == own.encode(text, add_special_tokens=adds is not False)
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    told = json.loads(call(server, "/tokenize", {"prompt": "hi", "return_token_strs": True, "model": "lora"})[1])
    assert told["token_strs"] == own.convert_ids_to_tokens(told["tokens"])
    back = json.loads(call(server, "/detokenize", {"model": "org/base", "tokens": answer["tokens"]})[1])
    assert back == {"prompt": own.decode(answer["tokens"])} == {"prompt": text}
    chat = {"model": "dora", "messages": [{"role": "user", "content": "hi"}]}
    expected = server.generation.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="user: hi\n"))).token_ids
    assert json.loads(call(server, "/tokenize", chat)[1])["tokens"] == list(expected)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": "x" * 5000}, 400, "prompt"),
        ("/tokenize", {"prompt": "x" * 5000, "add_special_tokens": False}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "absent"}, 404, "model"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}, 400, "messages"),
        ("/detokenize", {"tokens": [1] * 513}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
    ],
    ids=str,
)
def test_what_cannot_be_tokenized_is_refused_by_name(
    server: Server, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    got, error = error_of(call(server, path, body))
    assert (got, error["param"]) == (status, param), error


def test_unknown_fields_are_ignored_and_logged_where_the_operator_says_so(secured: Server) -> None:
    with secured.openai(api_key="g") as client:
        asked: dict[str, Any] = dict(model="base", prompt="x", max_tokens=2, temperature=0)
        extra = {"unheard_of": 1, "stream_options": {"new": 2}, "y" * 999: []}
        answer = client.completions.create(**asked, extra_body=extra)
        assert answer.choices == client.completions.create(**asked).choices
        secured.wait_logged(lambda line: "/v1/completions ignores 'unheard_of', 'new'" in line, "the ignored fields")
        with pytest.raises(openai.BadRequestError, match="suffix"):
            client.completions.create(**asked, suffix="x")
