"""What would let others in: token files, RPCs and addresses that are refused at the start."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from lorarep.v1 import model_pb2, model_pb2_grpc
from lorarep_server.addresses import is_loopback
from lorarep_server.auth import ROLES, TokenAuth, check_exposure, check_roles, read_tokens
from lorarep_server.config import ServerConfig

from lorarep_runtime.errors import InvalidArgument
from tests.support.secured import ADMIN, BASE_FLAGS, OK, PERMISSION_DENIED, bearer, check
from tests.support.servers import lorarep, serving


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


@pytest.mark.parametrize(
    ("field", "address"),
    [("listen", "0.0.0.0:0"), ("metrics_listen", "[::]:0"), ("openai_listen", "0.0.0.0:0")],
)
def test_an_address_that_is_open_to_others_is_refused(field: str, address: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}: {re.escape(repr(address))} is open to other machines"):
        check_exposure(ServerConfig(**{field: address}))
    for meant in ({"insecure": True}, {"token_file": Path("tokens")}, {"tls_client_ca": Path("ca")}):
        check_exposure(ServerConfig(**{field: address, **meant}))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
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
