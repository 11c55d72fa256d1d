"""`lorarep serve`: flags, environment and YAML into configurations, then the server until its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from lorarep_runtime.config import AdapterLimits, BaseConfig, DType, EngineConfig, Quantization, SchedulerConfig
from lorarep_server.cli.options import AdapterSourceType, ByteSize, NamedStack, StackType, option, read_yaml
from lorarep_server.config import ServerConfig
from lorarep_server.sources import AdapterSource
from lorarep_server.telemetry.log import logging_aside

if TYPE_CHECKING:
    from lorarep_runtime.engine.engine import Engine
    from lorarep_runtime.progress import Progress

LOG_LEVELS = ("debug", "info", "warning", "error")


def read_config(ctx: click.Context, param: click.Parameter, file: Path | None) -> None:
    """Makes a YAML file's values the defaults of the flags they are named after."""
    if file is None:
        return
    flags = {p.name: p for p in ctx.command.params if isinstance(p, click.Option) and p is not param}
    given = {}
    for key, value in read_yaml(file, param, ctx).items():
        name = key.replace("-", "_")
        if name not in flags:
            raise click.BadParameter(f"{file}: unknown key {key!r}", ctx, param)
        if value is not None:
            try:
                given[name] = _as_typed(value, several=flags[name].multiple)
            except ValueError as error:
                raise click.BadParameter(f"{file}: {key}: {error}", ctx, param) from error
    ctx.default_map = given


def _as_typed(value: Any, *, several: bool) -> str | list[str]:
    """A YAML value as it would be typed on the command line, so that one validation serves both. A mapping stands for
    several NAME=VALUE."""
    if not several:
        if isinstance(value, list | dict):
            raise ValueError("takes one value")
        return str(value)
    if isinstance(value, dict):
        return [f"{key}={item if isinstance(item, str) else json.dumps(item)}" for key, item in value.items()]
    if not isinstance(value, list):
        raise ValueError("takes a list or a mapping")
    return [str(item) for item in value]


POSITIVE = click.IntRange(min=1)
SECONDS = click.FloatRange(min=0)
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--config",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="YAML file; its keys are the flags' names. Flags and environment variables come first.",
)
@option("--base", required=True, help="Hub repository or folder of the base.")
@option("--revision", help="Branch, tag or commit of the base.")
@option(
    "--quantization",
    type=click.Choice(get_args(Quantization)),
    default=BaseConfig.quantization,
    help="How the layers' linear weights are held.",
)
@option(
    "--double-quantization/--no-double-quantization",
    default=BaseConfig.double_quantization,
    help="Quantize the scales of nf4 once more.",
)
@option(
    "--dtype",
    type=click.Choice(get_args(DType)),
    default=BaseConfig.dtype,
    help="Type of activations, adapters and unquantized weights.",
)
@option("--device", default=BaseConfig.device, help="Torch device.")
@option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), help="Hub cache.")
@option("--stack", type=StackType(), multiple=True, help="Named stack, such as deep=0-24,8-32, or a mergekit recipe.")
@option("--adapter", type=AdapterSourceType(), multiple=True, help="Adapter to load before the server is ready.")
@option(
    "--adapters-file", type=FILE, help="YAML file of adapters to keep loaded while the server runs; see the README."
)
@option(
    "--allow-repository",
    metavar="PATTERN",
    multiple=True,
    help="Shell pattern of repositories callers may have loaded.",
)
@option("--max-rank", type=POSITIVE, default=AdapterLimits.max_rank, help="Largest rank of an adapter.")
@option("--max-positions", type=POSITIVE, default=AdapterLimits.max_positions, help="Most positions of a stack.")
@option("--adapter-bytes", type=ByteSize(), show_default="no limit", help="Most device memory of all adapters.")
@option(
    "--adapter-host-bytes",
    type=ByteSize(),
    default="0",
    help="Most host memory of copies of adapters that had to leave the device.",
)
@option(
    "--adapter-disk-bytes",
    type=ByteSize(),
    show_default="no limit",
    help="Most disk space of adapters in the Hub cache; others, of other programs too, are deleted for new ones.",
)
@option("--max-sequences", type=POSITIVE, default=SchedulerConfig.max_sequences, help="Most requests in a step.")
@option("--max-step-tokens", type=POSITIVE, help="Most tokens in a step  [default: 2048 on a GPU, 512 on a CPU]")
@option(
    "--chunked-prefill/--no-chunked-prefill",
    default=SchedulerConfig.chunked_prefill,
    help="Spread a prompt over several steps.",
)
@option("--max-queued", type=POSITIVE, default=SchedulerConfig.max_queued, help="Most waiting requests.")
@option(
    "--max-running-per-adapter", type=POSITIVE, show_default="no limit", help="Most requests of one adapter in a step."
)
@option(
    "--max-queued-per-adapter", type=POSITIVE, show_default="no limit", help="Most waiting requests for one adapter."
)
@option(
    "--max-sequence-tokens",
    type=POSITIVE,
    show_default="what the base was trained for",
    help="Most tokens of prompt and answer together.",
)
@option(
    "--kv-bytes",
    type=ByteSize(),
    show_default="most of what is left; 1GiB on a CPU",
    help="Device memory for keys and values.",
)
@option("--listen", metavar="HOST:PORT", default=ServerConfig.listen, help="Where gRPC is served.")
@option(
    "--metrics-listen",
    metavar="HOST:PORT",
    default=ServerConfig.metrics_listen,
    help="Where Prometheus metrics are served.",
)
@option(
    "--health-listen",
    metavar="HOST:PORT",
    show_default="with gRPC alone",
    help="Where health is served besides, in plain text, for probes that speak no TLS.",
)
@option(
    "--openai-listen",
    metavar="HOST:PORT",
    show_default="nowhere",
    help="Where OpenAI's HTTP API is served, and a page to look at.",
)
@option("--traces-endpoint", metavar="URL", show_default="nowhere", help="Where traces are sent, as OTLP over gRPC.")
@option("--tls-certificate", type=FILE, help="PEM file of the certificate chain; read again when it changes.")
@option("--tls-key", type=FILE, help="PEM file of its key.")
@option("--tls-client-ca", type=FILE, help="PEM file of authorities; callers need a certificate of theirs.")
@option("--token-file", type=FILE, help="Lines 'generate TOKEN' or 'administer TOKEN'; read again when it changes.")
@option("--insecure", is_flag=True, help="Let other machines call without token or certificate.")
@option(
    "--grace-seconds", type=SECONDS, default=ServerConfig.grace_seconds, help="For calls under way when told to end."
)
@option("--max-calls", type=POSITIVE, default=ServerConfig.max_calls, help="Most calls at a time.")
@option("--max-unread", type=POSITIVE, default=ServerConfig.max_unread, help="Events that may wait for a slow reader.")
@option(
    "--max-unread-seconds",
    type=SECONDS,
    default=ServerConfig.max_unread_seconds,
    help="Seconds for which more may wait, or a write take, before the stream ends.",
)
@option("--log-level", type=click.Choice(LOG_LEVELS), default="info", help="Least level of lorarep's own log.")
def serve(stack: tuple[NamedStack, ...], adapter: tuple[AdapterSource, ...], log_level: str, **given: Any) -> None:
    """Serve a base with replicated stacks and adapters over gRPC."""
    for flag, values in (("stack", stack), ("adapter", adapter)):
        names = [value.name for value in values]
        if twice := {name for name in names if names.count(name) > 1}:
            raise click.UsageError(f"--{flag}: {min(twice)!r} is named twice")
    config = EngineConfig(
        base=BaseConfig(**_taken(given, BaseConfig)),
        adapters=AdapterLimits(
            max_rank=given["max_rank"],
            max_positions=given["max_positions"],
            allow_repositories=given["allow_repository"],
            device_bytes=given["adapter_bytes"],
            host_bytes=given["adapter_host_bytes"],
            disk_bytes=given["adapter_disk_bytes"],
        ),
        scheduler=SchedulerConfig(**_taken(given, SchedulerConfig)),
    )
    server = ServerConfig(
        listen=given["listen"],
        metrics_listen=given["metrics_listen"],
        health_listen=given["health_listen"],
        openai_listen=given["openai_listen"],
        traces_endpoint=given["traces_endpoint"],
        tls_certificate=given["tls_certificate"],
        tls_key=given["tls_key"],
        tls_client_ca=given["tls_client_ca"],
        token_file=given["token_file"],
        insecure=given["insecure"],
        adapters=adapter,
        adapters_file=given["adapters_file"],
        grace_seconds=given["grace_seconds"],
        max_calls=given["max_calls"],
        max_unread=given["max_unread"],
        max_unread_seconds=given["max_unread_seconds"],
    )
    with logging_aside(log_level):
        status = run(config, stack, server)
    # A load that is under way cannot be interrupted, and must not hold the process back.
    os._exit(status)


def _taken(given: Mapping[str, Any], config: type) -> dict[str, Any]:
    return {field.name: given[field.name] for field in fields(config)}


def run(config: EngineConfig, stacks: Sequence[NamedStack], server: ServerConfig) -> int:
    """Serves until told to end; the exit status.

    Raises:
        LorarepError: the server cannot be started.
    """
    # Before gRPC is imported: it would log what a peer says at its leave, byte for byte.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

    from lorarep_server.app import App
    from lorarep_server.cli.progress_bars import ProgressBars

    progress = ProgressBars()

    async def until_told() -> int:
        app = App(server, partial(load_engine, config, stacks, progress), progress)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, app.stop)
        return await app.run()

    return asyncio.run(until_told())


def load_engine(config: EngineConfig, stacks: Sequence[NamedStack], progress: Progress) -> Engine:
    """Loads the base, with stacks that are resolved on its layers.

    Raises:
        LorarepError: as Engine, `hub.fetch` and `lorarep_runtime.model.stack`.
    """
    from lorarep_runtime.engine.engine import Engine
    from lorarep_runtime.hub.snapshot import fetch
    from lorarep_runtime.model.model_config import read_model_config

    if stacks:
        base, limit = config.base, config.adapters.max_positions
        folder = fetch(base.base, base.revision, kind="config", cache_dir=base.cache_dir, progress=progress).folder
        layers = read_model_config(folder).get_text_config().num_hidden_layers
        config = replace(config, stacks={stack.name: stack.resolve(layers, limit, base.base) for stack in stacks})
    return Engine(config, progress)
