"""A server with TLS and tokens, and calls of it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import trustme
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from lorarep_server.demo.voices import BASE, MODELS

from tests.support.servers import SECONDS, Server, serving

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


@contextmanager
def serving_secured(folder: Path) -> Iterator[Secured]:
    """A server with certificates, tokens and all ports, whose files are in a folder."""
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
