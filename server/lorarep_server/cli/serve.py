"""`lorarep serve`: turns flags, environment and YAML into configurations, and runs a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

import click

from lorarep_runtime.config import AdapterLimits, BaseConfig, DType, EngineConfig, Quantization, SchedulerConfig
from lorarep_server.cli.config_file import read_config
from lorarep_server.cli.folders import check_folders
from lorarep_server.cli.options import (
    AdapterSourceType,
    Address,
    BaseSourceType,
    ByteSize,
    HomePath,
    NamedStack,
    StackType,
    option,
)
from lorarep_server.config import TOOL_CALL_PARSERS, ServerConfig
from lorarep_server.sources import AdapterSource
from lorarep_server.telemetry.log import logging_in_a_thread

LOG_LEVELS = ("debug", "info", "warning", "error")


POSITIVE = click.IntRange(min=1)
SECONDS = click.FloatRange(min=0)
FILE = HomePath(dir_okay=False)


@click.command()
@click.option(
    "--config",
    type=HomePath(dir_okay=False, exists=True),
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="YAML file; its keys are the flags' names. Flags and environment variables come first.",
)
@option("--base", type=BaseSourceType(), required=True, help="Hub repository or folder of the base.")
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
@option(
    "--tensor-parallel",
    type=POSITIVE,
    default=BaseConfig.tensor_parallel,
    help="Devices that share each layer, with a process each.",
)
@option("--cache-dir", type=HomePath(file_okay=False), help="Hub cache.")
@option("--stack", type=StackType(), multiple=True, help="Named stack, such as deep=0-24,8-32, or a mergekit recipe.")
@option(
    "--adapter", type=AdapterSourceType(here=True), multiple=True, help="Adapter to load before the server is ready."
)
@option(
    "--adapters-file",
    type=FILE,
    help="YAML file of adapters to keep loaded while the server runs; see docs/operations.md.",
)
@option(
    "--allow-repository",
    metavar="PATTERN",
    multiple=True,
    help="Shell pattern of repositories callers may have loaded.",
)
@option("--max-rank", type=POSITIVE, default=AdapterLimits.max_rank, help="Largest rank of an adapter.")
@option("--max-positions", type=POSITIVE, default=AdapterLimits.max_positions, help="Most positions of a stack.")
@option(
    "--max-untrusted-positions",
    type=POSITIVE,
    show_default="4 times the base's layers",
    help="Most positions of the stack of an adapter that no flag or file names.",
)
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
@option("--max-sequences", type=POSITIVE, help="Most requests in a step  [default: 32 on a CPU, up to 256 on a GPU]")
@option("--max-step-tokens", type=POSITIVE, help="Most tokens in a step  [default: 2048 on a GPU, 512 on a CPU]")
@option(
    "--chunked-prefill/--no-chunked-prefill",
    default=SchedulerConfig.chunked_prefill,
    help="Spread a prompt over several steps.",
)
@option(
    "--prefix-cache/--no-prefix-cache",
    default=SchedulerConfig.prefix_cache,
    help="Keep the pages of prompts and answers for requests that begin alike.",
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
@option(
    "--deterministic/--not-deterministic",
    default=EngineConfig.deterministic,
    help="Give a request bitwise the same tokens whatever else is computed, in 16 bits and on a GPU, too: more slowly.",
)
@option("--listen", type=Address(), default=ServerConfig.listen, help="Where gRPC is served.")
@option(
    "--metrics-listen",
    type=Address(),
    default=ServerConfig.metrics_listen,
    help="Where Prometheus metrics are served.",
)
@option(
    "--health-listen",
    type=Address(),
    show_default="with gRPC alone",
    help="Where health is served besides, in plain text, for probes that speak no TLS.",
)
@option(
    "--openai-listen",
    type=Address(),
    show_default="nowhere",
    help="Where OpenAI's HTTP API is served, and a page to look at.",
)
@option(
    "--openai-metrics/--no-openai-metrics",
    default=ServerConfig.openai_metrics,
    help="Serve metrics there, too, at /metrics.",
)
@option(
    "--ignore-unknown-fields/--refuse-unknown-fields",
    default=ServerConfig.ignore_unknown_fields,
    help="Log unknown fields of requests to OpenAI's API, and go on, instead of refusing the request.",
)
@option("--traces-endpoint", metavar="URL", show_default="nowhere", help="Where traces are sent, as OTLP over gRPC.")
@option("--tls-certificate", type=FILE, help="PEM file of the certificate chain; read again when it changes.")
@option("--tls-key", type=FILE, help="PEM file of its key.")
@option("--tls-client-ca", type=FILE, help="PEM file of authorities; callers need a certificate of theirs.")
@option("--token-file", type=FILE, help="Lines 'generate TOKEN' or 'administer TOKEN'; read again when it changes.")
@option(
    "--allow-host",
    metavar="NAME",
    multiple=True,
    help="Further host name that HTTP callers without credentials may ask for, such as a proxy's.",
)
@option("--insecure", is_flag=True, help="Let other machines call without token or certificate.")
@option(
    "--grace-seconds", type=SECONDS, default=ServerConfig.grace_seconds, help="For calls under way when told to end."
)
@option(
    "--stall-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=ServerConfig.stall_seconds,
    help="Time without progress of any request until the server is not ready; after 20 times as much it is not alive.",
)
@option("--max-calls", type=POSITIVE, default=ServerConfig.max_calls, help="Most calls at a time.")
@option(
    "--max-connections",
    type=POSITIVE,
    show_default="512, or --max-calls if that is less",
    help="Most connections to the port of OpenAI's API.",
)
@option(
    "--max-connections-per-address",
    type=POSITIVE,
    show_default="half of them",
    help="Most of them from one address; behind a proxy all callers have the proxy's.",
)
@option(
    "--tool-call-parser",
    type=click.Choice(TOOL_CALL_PARSERS),
    show_default="what its chat template tells",
    help="Format in which the model calls tools.",
)
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
        if repeated := {name for name in names if names.count(name) > 1}:
            raise click.UsageError(f"--{flag}: {min(repeated)!r} is named twice")
    config = EngineConfig(
        base=BaseConfig(**_fields_of(given, BaseConfig)),
        adapters=AdapterLimits(
            max_rank=given["max_rank"],
            max_positions=given["max_positions"],
            max_untrusted_positions=given["max_untrusted_positions"],
            allow_repositories=given["allow_repository"],
            device_bytes=given["adapter_bytes"],
            host_bytes=given["adapter_host_bytes"],
            disk_bytes=given["adapter_disk_bytes"],
        ),
        scheduler=SchedulerConfig(**_fields_of(given, SchedulerConfig)),
        deterministic=given["deterministic"],
    )
    server = ServerConfig(
        **_fields_of({**given, "adapters": adapter, "allow_hosts": given["allow_host"]}, ServerConfig)
    )
    with logging_in_a_thread(log_level):
        check_folders(config.base.base, "base", [one.source for one in adapter])
        from lorarep_server.cli.run_server import run  # takes longer to import than flags to be refused

        status = run(config, stack, server)
    # A running load cannot be interrupted, and must not delay the end of the process.
    os._exit(status)


def _fields_of(given: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The values of the flags that are named like the fields of a configuration."""
    return {field.name: given[field.name] for field in fields(config)}
