"""TLS, tokens and roles, and unsafe configurations that are refused: real processes, real certificates."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import trustme
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from lorarep.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from lorarep_server.addresses import is_loopback, parse_address
from lorarep_server.auth import ROLES, Role, TokenAuth, check_roles, read_tokens
from lorarep_server.demo.voices import BASE, MODELS

from lorarep_runtime.errors import InvalidArgument
from tests.support.callers import request
from tests.support.servers import SECONDS, Server, lorarep, serving

BASE_FLAGS = (f"--base={MODELS / BASE}", "--dtype=float32", "--kv-bytes=16MiB")
USER, ADMIN = "user-1234567890", "admin-1234567890"
OK = grpc.StatusCode.OK
UNAUTHENTICATED, PERMISSION_DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def replace(file: Path, content: bytes) -> None:
    """Replaces a file atomically, as a secret is renewed."""
    aside = file.with_suffix(".new")
    aside.write_bytes(content)
    aside.rename(file)


def bearer(token: str) -> dict[str, Any]:
    return dict(metadata=(("authorization", f"Bearer {token}"),))


def call(channel: grpc.Channel, method: MethodDescriptor, **given: Any) -> grpc.StatusCode:
    """The status of an RPC with an empty request. A stream is OK at its first message or at its end."""
    kinds = ("stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary")
    message = GetMessageClass(method.input_type)()
    stub = getattr(channel, "_".join(kinds))(
        f"/{method.containing_service.full_name}/{method.name}", type(message).SerializeToString, bytes
    )
    try:
        answer = stub(iter([message]) if method.client_streaming else message, timeout=SECONDS, **given)
        if method.server_streaming:
            next(answer)
            answer.cancel()
    except grpc.RpcError as error:
        return error.code()
    return OK


def described(channel: grpc.Channel) -> list[MethodDescriptor]:
    """All RPCs that a server's reflection lists."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    services = [pool.FindServiceByName(name) for name in database.get_services()]
    return [method for service in services for method in service.methods]


def path(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


@dataclass(frozen=True)
class Secured:
    """A server with TLS and tokens that other machines can reach."""

    server: Server
    folder: Path
    ca: trustme.CA
    """The authority of both sides' certificates."""
    chain: bytes
    """PEM of the caller's certificate chain."""
    key: bytes
    """PEM of the key of the caller's certificate."""

    def credentials(self, ca: trustme.CA | None = None, **client: bytes | None) -> grpc.ChannelCredentials:
        own = {"private_key": self.key, "certificate_chain": self.chain, **client}
        return grpc.ssl_channel_credentials((ca or self.ca).cert_pem.bytes(), **own)

    def channel(self, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
        """A channel with a connection of its own; equal channels would share one."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        credentials = credentials or self.credentials()
        return grpc.secure_channel(self.server.address, credentials, options)

    def rpcs(self) -> list[MethodDescriptor]:
        token = grpc.access_token_call_credentials(USER)
        with self.channel(grpc.composite_channel_credentials(self.credentials(), token)) as channel:
            return described(channel)

    @contextmanager
    def openai(self, token: str, *, has_certificate: bool = True) -> Iterator[openai.OpenAI]:
        context = ssl.create_default_context(cafile=self.folder / "ca.crt")
        if has_certificate:
            context.load_cert_chain(self.folder / "caller.crt", self.folder / "caller.key")
        url = f"https://127.0.0.1:{self.server.openai_port}/v1"
        with openai.DefaultHttpxClient(verify=context) as http:
            yield self.server.openai(base_url=url, api_key=token, http_client=http)

    def install(self, cert: trustme.LeafCert) -> None:
        replace(self.folder / "tls.key", cert.private_key_pem.bytes())
        replace(self.folder / "tls.crt", b"".join(pem.bytes() for pem in cert.cert_chain_pems))


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    own, callers = ca.issue_cert("127.0.0.1", "localhost"), ca.issue_cert("caller@example.org")
    own.private_key_pem.write_to_path(str(folder / "tls.key"))
    own.cert_chain_pems[0].write_to_path(str(folder / "tls.crt"))
    ca.cert_pem.write_to_path(str(folder / "ca.crt"))
    callers.private_key_pem.write_to_path(str(folder / "caller.key"))
    callers.cert_chain_pems[0].write_to_path(str(folder / "caller.crt"))
    (folder / "tokens").write_text(f"# who may what\n\ngenerate {USER}\n  administer\t{ADMIN}  \n")
    flags = [f"--tls-certificate={folder}/tls.crt", f"--tls-key={folder}/tls.key", f"--tls-client-ca={folder}/ca.crt"]
    flags += [f"--token-file={folder}/tokens", "--listen=0.0.0.0:0", "--metrics-listen=0.0.0.0:0"]
    flags += ["--health-listen=0.0.0.0:0", "--openai-listen=0.0.0.0:0"]
    with serving([*BASE_FLAGS, *flags]) as server:
        chain, key = callers.cert_chain_pems[0].bytes(), callers.private_key_pem.bytes()
        yield Secured(server, folder, ca, chain, key)


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


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"generate a\nsecret\n", "line 2"),
        (b"# generate a\n\nroot secret\n", "line 3"),
        (b"generate a secret\n", "line 1"),
        (b"Generate secret\n", "line 1"),
        (b"generate secret\xc3\xa9\n", "line 1"),
        (b"generate a\nadminister secret\ngenerate secret", "line 3"),
        (b"# generate secret\n", "has no token"),
    ],
)
def test_a_malformed_line_is_refused_by_number(tmp_path: Path, content: bytes, named: str) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(InvalidArgument, match=named) as error:
        read_tokens(file)
    assert "secret" not in str(error.value)


def test_an_rpc_without_a_role_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = list(model_pb2.DESCRIPTOR.services_by_name.values())
    check_roles(services)
    forgotten = "/lorarep.v1.ModelService/GetModel"
    monkeypatch.delitem(ROLES, forgotten)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=forgotten):
        check_roles(services)
    file = tmp_path / "tokens"
    file.write_text(f"administer {ADMIN}\n")

    class Model(model_pb2_grpc.ModelServiceServicer):
        async def GetModel(self, request: Any, context: Any) -> model_pb2.GetModelResponse:
            return model_pb2.GetModelResponse()

    async def code() -> Any:
        server = grpc.aio.server(interceptors=(TokenAuth(file),))
        model_pb2_grpc.add_ModelServiceServicer_to_server(Model(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(), **bearer(ADMIN))
        except grpc.aio.AioRpcError as error:
            return error.code()
        finally:
            await server.stop(None)

    assert asyncio.run(code()) is PERMISSION_DENIED


def check(channel: grpc.Channel) -> grpc.StatusCode:
    """The status of a health check, which needs no token."""
    with channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="liveness"), timeout=SECONDS
            )
        except grpc.RpcError as error:
            return error.code()
        return OK


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


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--listen=0.0.0.0:0"], "listen: '0.0.0.0:0' is open to other machines"),
        (["--metrics-listen=[::]:0"], "metrics_listen: '[::]:0' is open to other machines"),
        (["--openai-listen=0.0.0.0:0"], "openai_listen: '0.0.0.0:0' is open to other machines"),
        (["--tls-client-ca=ca.crt"], "TLS needs tls_certificate and tls_key"),
        (["--tls-certificate=absent", "--tls-key=absent"], "tls_certificate: cannot use 'absent'"),
        (["--token-file=absent"], "token_file: cannot read 'absent'"),
    ],
    ids=str,
)
def test_an_unsafe_start_is_refused_in_one_line(flags: list[str], named: str) -> None:
    ended = lorarep("serve", *BASE_FLAGS, "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", *flags)
    assert ended.returncode == 1
    assert named in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


def test_insecure_says_that_it_is_meant() -> None:
    with serving([*BASE_FLAGS, "--listen=0.0.0.0:0", "--metrics-listen=0.0.0.0:0", "--insecure"]) as server:
        assert check(server.channel) is OK


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.0.1:0", True),
        ("[::1]:50051", True),
        ("localhost:50051", True),
        ("unix:/run/lorarep.sock", True),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        (":50051", False),
        ("10.0.0.1:50051", False),
        ("example.org:50051", False),
        ("localhost.example.org:50051", False),
        ("ipv4:0.0.0.0:1,127.0.0.1:50051", False),
    ],
)
def test_loopback_is_known_by_its_address(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


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
