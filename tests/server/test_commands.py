"""The command line against a running server, and `lorarep verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from lorarep_server.cli.commands import main
from transformers import AutoConfig, AutoModelForCausalLM

from lorarep_runtime.model import family_check
from lorarep_runtime.model.family_comparison import refusal
from lorarep_runtime.model.model_config import read_model_config
from lorarep_runtime.model.transformers_attention import register_attention
from tests.support.callers import request
from tests.support.models import SHAPE, save_adapter, save_tokenizer
from tests.support.servers import OnTerminal, Server, lorarep
from tests.support.world import ADAPTERS, World


def test_generate_streams_to_the_terminal(server: Server) -> None:
    answer = server.generation.Generate(request("abc", "lora", new_tokens=20))
    flags = [f"--server={server.address}", "--adapter=lora", "--max-new-tokens=20", "--ignore-eos"]
    assert lorarep("generate", *flags, "abc").stdout == f"{answer.text}\n"
    assert lorarep("generate", *flags, stdin="abc").stdout == f"{answer.text}\n"


def test_adapters_are_loaded_listed_and_unloaded(server: Server) -> None:
    at = f"--server={server.address}"
    loaded = lorarep("adapters", "load", "typed=org/plain", at)
    assert loaded.stdout.startswith("typed: org/plain at ")
    assert loaded.stdout.endswith(", 6 positions\n")
    assert loaded.stderr.startswith("waiting\n")
    assert "%|" not in loaded.stderr  # standard error is no terminal
    assert "typed" in lorarep("adapters", "list", env={"LORAREP_ADAPTERS_LIST_SERVER": server.address}).stdout
    assert lorarep("adapters", "unload", "typed", at).returncode == 0
    again = lorarep("adapters", "unload", "typed", at)
    assert (again.returncode, again.stderr) == (1, "Error: NOT_FOUND: adapter: 'typed' is not loaded\n")


def test_a_server_that_is_not_there_is_said_in_one_line() -> None:
    ended = lorarep("generate", "--server=127.0.0.1:1", "abc")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: UNAVAILABLE: ")
    assert len(ended.stderr.splitlines()) == 1


def test_an_unexpected_error_is_one_line_and_its_traceback_is_printed_on_demand(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_bytes(b"\xff")  # not UTF-8
    command = ("generate", f"--token-file={token}", "abc")
    short = lorarep(*command)
    assert (short.returncode, len(short.stderr.splitlines())) == (1, 1)
    assert short.stderr.startswith("Error: UnicodeDecodeError: ")
    assert "lorarep --debug" in short.stderr
    for long in (lorarep("--debug", *command), lorarep(*command, env={"LORAREP_DEBUG": "1"})):
        assert long.returncode == 1
        assert long.stderr.startswith("Traceback ")
        assert long.stderr.splitlines()[-1].startswith("Error: UnicodeDecodeError: ")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_verify_finds_an_adapter_the_same(world: World, quantization: str) -> None:
    """In this process, which has all libraries already."""
    flags = ["--base", str(world.base), "--dtype=float32", "--device=cpu", f"--quantization={quantization}"]
    adapter = ["--adapter", str(world.adapters["dora"]), "--max-new-tokens=8"]
    ended = CliRunner().invoke(main, ["verify", *flags, *adapter])
    assert ended.exit_code == 0, ended.stderr
    assert "the same but for rounding" in ended.stdout
    assert "physically stacked, under PEFT" in ended.stdout


def test_progress_of_every_stage_is_on_the_terminal(world: World, tmp_path: Path) -> None:
    """Progress bars are for terminals only; see `test_a_server_draws_no_bars_into_its_log`."""
    arguments = ["verify", "--base=org/base", "--adapter=org/lora", "--quantization=nf4", "--device=cpu"]
    arguments += ["--dtype=float32", "--max-new-tokens=1", f"--cache-dir={tmp_path}"]
    shown = OnTerminal(*arguments, env=world.env)
    assert shown.wait() == 0, shown.shown
    for stage in ("download", "quantize", "compile"):
        assert f"{stage}: 100%" in shown.shown, shown.shown


def test_a_server_draws_no_bars_into_its_log(server: Server) -> None:
    log = "".join(server.log)
    assert "%|" not in log
    assert "HTTP Request" not in log


def test_verify_refuses_what_serving_refuses(world: World, tmp_path: Path) -> None:
    folder = save_adapter(world.base, tmp_path / "bad", **ADAPTERS["plain"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bias": "boft_only"}))
    flags = ["--base", str(world.base), "--adapter", str(folder), "--device=cpu", "--dtype=float32"]
    ended = CliRunner().invoke(main, ["verify", *flags])
    assert (ended.exit_code, ended.stderr.splitlines()[-1][:12]) == (1, "Error: bias:")


def test_serve_and_verify_refuse_a_base_that_they_would_compute_otherwise(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("diffllama", **SHAPE)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    flags = ("--base", str(tmp_path), "--device=cpu", f"--cache-dir={tmp_path}")
    served = lorarep("serve", *flags, "--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0")
    # This process has all libraries already.
    register_attention()
    monkeypatch.setattr(family_check, "_judged", lambda folder: refusal(read_model_config(folder)))
    verified = CliRunner().invoke(main, ["verify", *flags, "--adapter", str(world.adapters["plain"])])
    assert (served.returncode, verified.exit_code) == (1, 1)
    why = "base: a base of type 'diffllama' cannot be served exactly: its layers attend more than once"
    assert f"Error: {why}\n" in served.stderr
    assert verified.stderr.endswith(f"Error: {why}\n")
