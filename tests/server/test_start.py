"""What an operator is told at the start and at the end of a server, and what mistakes in its flags say."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from lorarep_server.addresses import parse_address
from lorarep_server.cli.options import AdapterSourceType, Address
from lorarep_server.cli.progress_log import ProgressLog
from lorarep_server.cli.serve import serve
from lorarep_server.loading.adapters_file import read_adapters
from lorarep_server.sources import split_here

from tests.support.callers import request, stream
from tests.support.failpoints import Failpoints
from tests.support.servers import SECONDS, Server, lorarep, serving
from tests.support.world import World


def test_folders_progress_and_a_second_interrupt(world: World, tmp_path: Path) -> None:
    """The folder models/y is relative to where the server is started, and the Hub has no models/y."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "y").symlink_to(world.adapters["lora"])
    failpoints = Failpoints(tmp_path / "failpoints")
    env = {**world.env, "LORAREP_FAILPOINTS": str(failpoints.folder)}
    with serving([*world.flags(), "--adapter=x=models/y"], env, tmp_path) as server:
        server.wait_ready()
        log = "".join(server.log)
        assert "'models/y' is a folder here" in log
        stages = re.findall(r"progress_log: (\w+)", log[log.index("listening on port") : log.index(": ready: ")])
        assert set(stages) >= {"load", "compile"}
        assert re.search(r"threads: \d+ threads on \d+ processors, of which \d+ may be used", log)
        failpoints.set("step", "hold")
        call = stream(server, request("abc", "x"))
        failpoints.wait_reached("step")
        server.process.send_signal(signal.SIGINT)
        server.wait_logged(re.compile("a second Ctrl-C").search, "the first interrupt")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(5) == 130
        call.cancel()


def test_an_operators_folder_goes_before_a_repository_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/here", "org/with@sign"):
        Path(name).mkdir(parents=True)
    assert split_here("org/here") == ("./org/here", None)
    assert split_here("org/with@sign") == ("./org/with@sign", None)
    assert split_here("org/here@main") == ("./org/here", "main")  # refused as a folder's revision
    assert split_here("org/there@main") == ("org/there", "main")
    file = tmp_path / "adapters.yaml"
    file.write_text("a: {repository: org/here}")
    assert read_adapters(file)["a"].repository == "./org/here"
    # What a client asks a server for is not on the client's machine.
    assert AdapterSourceType(here=False).convert("a=org/here", None, None).source == "org/here"


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave `--flag=~/...` as it is, and nothing else expands what is in a file or the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "stack.yaml").write_text("{slices: [], merge_method: passthrough}")
    (tmp_path / "server.yaml").write_text("{cache_dir: ~/cache, token_file: ~/tokens, stack: {deep: ~/stack.yaml}}")
    flags = ["--config=~/server.yaml", "--base=x", "--tls-key=~/key"]
    given = serve.make_context("serve", flags, auto_envvar_prefix="LORAREP_SERVE").params
    paths = [given["cache_dir"], given["token_file"], given["tls_key"]]
    assert paths == [tmp_path / "cache", tmp_path / "tokens", tmp_path / "key"]
    assert given["stack"][0].source == {"slices": [], "merge_method": "passthrough"}


@pytest.mark.parametrize("command", ["serve", "plan", "verify"])
def test_a_wrong_folder_is_told_before_torch_is_imported(tmp_path: Path, command: str) -> None:
    adapter = ["--adapter=x"] if command == "verify" else []
    seen = f"""if True:
        import sys
        from lorarep_server.cli import main
        try:
            main({[command, f"--base={tmp_path}", *adapter]!r}, standalone_mode=False)
        except Exception as error:
            print(type(error).__name__, error, 'torch' in sys.modules)
        """
    ended = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, timeout=SECONDS)
    missing = "config.json" if command == "plan" else "model.safetensors"
    assert ended.stdout == f"ClickException {tmp_path}: has no {missing} False\n", ended.stderr


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen", "--health-listen", "--openai-listen"])
def test_an_address_without_a_host_is_told_its_form(flag: str) -> None:
    with pytest.raises(click.BadParameter, match=r"'5555' is not HOST:PORT, such as 127\.0\.0\.1:5555 or \[::1\]:5555"):
        serve.main(["--base=org/base", f"{flag}=5555"], standalone_mode=False)


def test_addresses_are_hosts_with_ports() -> None:
    for address in ("127.0.0.1:0", "localhost:50051", ":50051", "[::1]:50051", "unix:/run/lorarep.sock"):
        assert Address().convert(address, None, None) == address
    for address in ("", "localhost", "localhost:http", "::1", "localhost:65536", "localhost:-1"):
        with pytest.raises(click.BadParameter, match="is not HOST:PORT"):
            Address().convert(address, None, None)
    assert parse_address("[::1]:50051") == ("::1", 50051)


def test_a_port_that_is_in_use_is_said_to_be(world: World, server: Server) -> None:
    ended = lorarep("serve", *world.flags(), f"--listen={server.address}", "--metrics-listen=127.0.0.1:0")
    assert ended.returncode == 1
    told = f"Error: listen: cannot serve at '{server.address}': address already in use"
    assert ended.stderr.splitlines()[-1].startswith(told)


def test_the_command_line_is_a_module_too() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "lorarep_server.cli", "--help"], capture_output=True, text=True, timeout=SECONDS
    )
    assert (ended.returncode, "serve" in ended.stdout) == (0, True)


def test_progress_is_a_line_a_stage_and_one_every_pause(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    progress = ProgressLog(pause=3600)
    for done in range(5):
        progress("download", done * 10**6, 4 * 10**6)
    progress("check", 0, 0)
    often = ProgressLog(pause=0)
    for done in (1, 2):
        often("load", done, 2)
    assert caplog.messages == ["download: 0.0 of 4.0 MB", "check", "load: 1 of 2", "load: 2 of 2"]
