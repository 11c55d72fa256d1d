"""TLS, tokens and roles: a real server, real certificates."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lorarep.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from lorarep_server.addresses import parse_address
from lorarep_server.auth import ROLES, Role

from tests.support.callers import request
from tests.support.secured import (
    ADMIN,
    OK,
    PERMISSION_DENIED,
    UNAUTHENTICATED,
    UNAVAILABLE,
    USER,
    Secured,
    bearer,
    call,
    check,
    path,
    replace,
    serving_secured,
)
from tests.support.servers import SECONDS, lorarep


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with serving_secured(tmp_path_factory.mktemp("tls")) as secured:
        yield secured


def test_every_rpc_but_health_wants_a_token(secured: Secured) -> None:
    wrong = [
        {},
        bearer(""),
        bearer("wrong"),
        bearer(USER[:-1]),
        bearer(f"{USER}x"),
        bearer("generate"),
        dict(metadata=(("authorization", USER),)),
        dict(metadata=(("authorization", f"Basic {USER}"),)),
        dict(metadata=bearer(USER)["metadata"] * 2),
        dict(metadata=(("token", USER),)),
    ]
    rpcs = secured.rpcs()
    assert {path(rpc) for rpc in rpcs} == ROLES.keys()
    with secured.channel() as channel:
        for rpc in rpcs:
            is_open = rpc.containing_service.full_name == "grpc.health.v1.Health"
            for given in wrong:
                assert (call(channel, rpc, **given) is UNAUTHENTICATED) != is_open, (rpc.name, given)


def test_health_alone_is_in_plain_text_on_its_own_port(secured: Secured) -> None:
    secured.server.wait_ready()
    port = next(found[1] for line in secured.server.log if (found := re.search(r"health alone on port (\d+)", line)))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for service in ("", "liveness", "readiness"):
            asked = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for rpc in secured.rpcs():
            if rpc.containing_service.full_name != "grpc.health.v1.Health":
                assert call(channel, rpc, **bearer(ADMIN)) is grpc.StatusCode.UNIMPLEMENTED


def test_a_token_opens_what_its_role_includes(secured: Secured) -> None:
    administered = {name.rpartition("/")[2] for name, role in ROLES.items() if role is Role.ADMINISTER}
    assert administered == {"LoadAdapter", "UnloadAdapter"}
    with secured.channel() as channel:
        for rpc in secured.rpcs():
            denied = call(channel, rpc, **bearer(USER)) is PERMISSION_DENIED
            assert denied == (rpc.name in administered), rpc.name
            assert call(channel, rpc, **bearer(ADMIN)) not in (UNAUTHENTICATED, PERMISSION_DENIED), rpc.name


def test_the_port_of_openai_wants_certificate_and_token_too(secured: Secured) -> None:
    secured.server.wait_ready()
    for token in (USER, ADMIN):
        with secured.openai(token) as client:
            base, *_ = client.models.list().data
            answer = client.completions.create(model=base.id, prompt="the quick", max_tokens=3)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens > 0
    for token in ("wrong", USER[:-1], f"{USER}x", "generate"):
        with secured.openai(token) as client:
            for ask in (client.models.list, lambda client=client: client.get("/absent", cast_to=object)):
                with pytest.raises(openai.AuthenticationError) as error:
                    ask()
                assert error.value.code == "invalid_api_key"
    with secured.openai(USER, has_certificate=False) as client, pytest.raises(openai.APIConnectionError):
        client.models.list()
    with secured.server.openai(api_key=USER) as client, pytest.raises(openai.APIConnectionError):
        client.models.list()  # in plain text


def test_an_rpc_that_is_not_there_is_told_to_callers_with_a_token_alone(secured: Secured) -> None:
    with secured.channel() as channel:
        absent = channel.unary_unary("/lorarep.v1.ModelService/Absent")  # type: ignore[call-arg]
        for given, code in (({}, UNAUTHENTICATED), (bearer(USER), grpc.StatusCode.UNIMPLEMENTED)):
            with pytest.raises(grpc.RpcError) as error:
                absent(b"", timeout=SECONDS, **given)
            assert error.value.code() is code


def test_tokens_are_read_again_when_their_file_changes(secured: Secured) -> None:
    file = secured.folder / "tokens"
    before = file.read_bytes()
    with secured.channel() as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)

        def is_known(token: str) -> bool:
            try:
                stub.GetModel(model_pb2.GetModelRequest(), timeout=SECONDS, **bearer(token))
            except grpc.RpcError as error:
                return error.code() is not UNAUTHENTICATED
            return True

        try:
            replace(file, b"generate another-token\n")
            assert (is_known(USER), is_known("another-token")) == (False, True)
            for broken in (b"generate another-token\ngenerate\n", b"", None):
                if broken is None:
                    file.unlink()
                else:
                    replace(file, broken)
                # Two calls, but one line in the log.
                assert [is_known("another-token") for _ in range(2)] == [True, True]
        finally:
            replace(file, before)
        assert (is_known(USER), is_known("another-token")) == (True, False)
    for complaint in ("line 2 of", "has no token", "cannot read"):
        secured.server.wait_logged(lambda line, complaint=complaint: complaint in line, complaint)
        assert "".join(secured.server.log).count(complaint) == 1, secured.server.log
    log = "".join(secured.server.log)
    assert not any(token in log for token in (USER, ADMIN, "another-token"))


def test_plaintext_and_wrong_certificates_are_refused(secured: Secured) -> None:
    other = trustme.CA()
    stranger = other.issue_cert("caller@example.org")
    strangers = dict(
        private_key=stranger.private_key_pem.bytes(), certificate_chain=stranger.cert_chain_pems[0].bytes()
    )
    assert check(grpc.insecure_channel(secured.server.address)) is UNAVAILABLE
    for refused in (
        secured.credentials(other),
        secured.credentials(private_key=None, certificate_chain=None),
        secured.credentials(**strangers),
    ):
        assert check(secured.channel(refused)) is UNAVAILABLE
    assert check(secured.channel()) is OK


def served_certificate(secured: Secured) -> str:
    """The server's certificate on a new connection, in PEM."""
    with secured.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    return ssl.get_server_certificate(parse_address(secured.server.address))


def test_certificates_are_renewed_while_an_old_stream_runs(secured: Secured) -> None:
    secured.server.wait_ready()
    first, second = served_certificate(secured), secured.ca.issue_cert("127.0.0.1")
    wanted = generation_pb2.GenerateStreamRequest(request=request("the quick", new_tokens=200))
    with secured.channel() as old:
        watch = health_pb2_grpc.HealthStub(old).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        answer = generation_pb2_grpc.GenerationServiceStub(old).GenerateStream(wanted, **bearer(USER))
        next(answer)
        secured.install(second)
        renewed = served_certificate(secured)
        assert renewed != first
        assert renewed.strip() == second.cert_chain_pems[0].bytes().decode().strip()
        # A key of another certificate cannot be used: one log line, and the old certificate stays.
        replace(secured.folder / "tls.key", secured.ca.issue_cert("127.0.0.1").private_key_pem.bytes())
        assert [served_certificate(secured) for _ in range(2)] == [renewed] * 2
        secured.server.wait_logged(lambda line: "tls_certificate: cannot use" in line, "the complaint")
        assert sum("tls_certificate: cannot use" in line for line in secured.server.log) == 1
        replace(secured.folder / "tls.crt", b"not a certificate")
        assert served_certificate(secured) == renewed
        secured.install(secured.ca.issue_cert("127.0.0.1"))
        assert served_certificate(secured) != renewed
        assert sum(len(message.chunk.token_ids) for message in answer) == 200
        assert watch.is_active()


def test_certificates_of_the_port_of_openai_are_renewed_too(secured: Secured) -> None:
    secured.server.wait_ready()
    new = secured.ca.issue_cert("127.0.0.1")
    secured.install(new)
    served = ssl.get_server_certificate(("127.0.0.1", secured.server.openai_port))
    assert served.strip() == new.cert_chain_pems[0].bytes().decode().strip()
    before = (secured.folder / "ca.crt").read_bytes()
    context = ssl.create_default_context(cadata=before.decode())
    context.load_cert_chain(secured.folder / "caller.crt", secured.folder / "caller.key")
    url = f"https://127.0.0.1:{secured.server.openai_port}/v1"

    def call() -> None:
        """Lists models over a new connection."""
        with (
            openai.DefaultHttpxClient(verify=context) as http,
            secured.server.openai(base_url=url, api_key=USER, http_client=http) as client,
        ):
            client.models.list()

    call()
    replace(secured.folder / "ca.crt", trustme.CA().cert_pem.bytes())
    try:
        with pytest.raises(openai.APIConnectionError):
            call()
    finally:
        replace(secured.folder / "ca.crt", before)
    call()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", ["openai", "grpc"])
def test_no_session_outlives_the_authority_of_its_certificate(
    secured: Secured, name: str, version: ssl.TLSVersion
) -> None:
    port = secured.server.openai_port if name == "openai" else parse_address(secured.server.address)[1]
    before = (secured.folder / "ca.crt").read_bytes()
    context = ssl.create_default_context(cadata=before.decode())
    context.load_cert_chain(secured.folder / "caller.crt", secured.folder / "caller.key")
    context.minimum_version = context.maximum_version = version
    first = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    if name == "grpc":
        context.set_alpn_protocols(["h2"])
        first = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # and empty settings

    def ask(session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool | None]:
        """Has an answer over a new connection. The session that can be resumed, and whether the given one was."""
        with (
            socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as connection,
        ):
            connection.sendall(first)
            if not connection.recv(1 << 12):
                raise ConnectionError("closed")
            return connection.session, connection.session_reused

    session, _ = ask(None)
    session, is_resumed = ask(session)
    assert is_resumed
    replace(secured.folder / "ca.crt", trustme.CA().cert_pem.bytes())
    try:
        with pytest.raises(OSError):  # noqa: PT011 (an alert or the end, as they come)
            ask(session)
    finally:
        replace(secured.folder / "ca.crt", before)
    ask(None)


def test_the_command_line_brings_certificate_and_token(secured: Secured, tmp_path: Path) -> None:
    secured.server.wait_ready()
    folder = secured.folder
    (tmp_path / "user").write_text(f"{USER}\n")
    at = [f"--server={secured.server.address}", f"--tls-ca={folder}/ca.crt"]
    at += [f"--tls-certificate={folder}/caller.crt", f"--tls-key={folder}/caller.key"]
    healthy = lorarep("health", *at)
    assert (healthy.returncode, healthy.stdout) == (0, "SERVING\n"), healthy.stderr
    assert lorarep("health", f"--server={secured.server.address}", "--timeout=2").returncode == 1
    missing = lorarep("generate", *at, "the quick").stderr
    assert missing.startswith("Error: UNAUTHENTICATED: ")
    assert missing.endswith(" (--token-file or LORAREP_TOKEN gives one)\n")
    wrong = lorarep("generate", *at, "the quick", env={"LORAREP_TOKEN": "x"}).stderr
    assert wrong == "Error: UNAUTHENTICATED: authorization: the token is not known (LORAREP_TOKEN gave it)\n"
    user = [*at, f"--token-file={tmp_path}/user"]
    generated = lorarep("generate", *user, "--max-new-tokens=4", "the quick")
    assert generated.returncode == 0, generated.stderr
    denied = lorarep("adapters", "unload", "x", *user)
    assert denied.stderr == "Error: PERMISSION_DENIED: needs a token to administer\n"
    allowed = lorarep("adapters", "unload", "x", *at, env={"LORAREP_TOKEN": ADMIN})
    assert allowed.stderr == "Error: NOT_FOUND: adapter: 'x' is not loaded\n"
