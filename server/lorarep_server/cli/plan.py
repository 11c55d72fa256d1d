"""`lorarep plan`: the memory of a base, its stacks and its adapters, and the merged plan, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from lorarep_runtime.config import PAGE_TOKENS, AdapterLimits, BaseConfig, DType, Quantization
from lorarep_server.cli.folders import check_folders
from lorarep_server.cli.options import BaseSourceType, ByteSize, HomePath, NamedStack, StackType, option
from lorarep_server.sources import AdapterSource, is_folder, split_here

if TYPE_CHECKING:
    from lorarep_runtime.model.footprint import Footprint
    from lorarep_runtime.model.plan import Plan
    from lorarep_runtime.model.stack import Stack
    from lorarep_runtime.progress import Progress


CPU_ONLY = "  served on a CPU alone: it has a head, an embedding, experts or a router, or is an aLoRA"


class OptionalNameType(click.ParamType):  # type: ignore[type-arg]
    """An adapter to count, written [NAME=]SOURCE[@REVISION]. The default name is the source."""

    name = "[NAME=]SOURCE[@REVISION]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> AdapterSource:
        name, equals, source = value.partition("=")
        repository, revision = split_here(source if equals else value)
        if not repository or not name:
            self.fail(f"{value!r} is not [NAME=]SOURCE[@REVISION]", param, ctx)
        default = Path(repository).name if is_folder(repository) else repository
        return AdapterSource(name if equals else default, repository, revision)


@click.command()
@option("--base", type=BaseSourceType(), required=True, help="Hub repository or folder of the base.")
@option("--revision", help="Branch, tag or commit of the base.")
@option("--adapter", type=OptionalNameType(), multiple=True, help="Adapter to count.")
@option("--stack", type=StackType(), multiple=True, help="Named stack, such as deep=0-24,8-32, or a mergekit recipe.")
@option("--quantization", type=click.Choice(get_args(Quantization)), default=BaseConfig.quantization)
@option("--double-quantization", is_flag=True, help="Quantize the scales of nf4 once more.")
@option("--dtype", type=click.Choice(get_args(DType)), default=BaseConfig.dtype, help="Type of activations.")
@option("--memory", type=ByteSize(), default="80GiB", help="Device memory that sequences have to fit in.")
@option("--tokens", type=click.IntRange(min=1), default=4096, help="Tokens of each such sequence.")
@option("--cache-dir", type=HomePath(file_okay=False), help="Hub cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    adapter: tuple[AdapterSource, ...],
    stack: tuple[NamedStack, ...],
    memory: int,
    tokens: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Show what a base, its stacks and adapters take, from configurations and file headers alone."""
    counted = count(BaseConfig(**given), adapter, stack, memory, tokens)
    click.echo(json.dumps(counted, indent=2) if as_json else render(counted))


def count(
    base: BaseConfig, adapters: tuple[AdapterSource, ...], stacks: tuple[NamedStack, ...], memory: int, tokens: int
) -> dict[str, Any]:
    """Computes everything that the command prints.

    Args:
        base: the base and its quantization.
        adapters, stacks: the adapters and named stacks to count.
        memory: bytes of device memory that sequences have to fit in.
        tokens: tokens of each sequence.

    Raises:
        LorarepError: as `hub.snapshot.fetch`, `AdapterConfig.parse`, `layout_of`, `checked_header` and
            `NamedStack.resolve`.
    """
    check_folders(base.base, "config", [adapter.source for adapter in adapters])
    from lorarep_runtime.hub.snapshot import fetch
    from lorarep_runtime.model.footprint import quantization_kind
    from lorarep_runtime.model.model_config import read_model_config
    from lorarep_server.cli.progress_bars import ProgressBars

    progress = ProgressBars()
    snapshot = fetch(base.base, base.revision, kind="config", cache_dir=base.cache_dir, progress=progress)
    quantization, footprint = _footprint(base, read_model_config(snapshot.folder))
    by_name: dict[str, Stack] = {"base": tuple(range(footprint.layers))}
    for named in stacks:
        by_name[named.name] = named.resolve(footprint.layers, AdapterLimits().max_positions, base.base)
    rows: list[dict[str, Any]] = []
    for source in adapters:
        by_name[source.name], row = _adapter(source, snapshot.repository, footprint, base.cache_dir, progress)
        rows.append(row)
    adapter_bytes = sum(row["bytes"] for row in rows)
    return {
        "base": snapshot.repository,
        "commit": snapshot.commit,
        "quantization": quantization_kind(quantization),
        "dtype": str(footprint.dtype).removeprefix("torch."),
        "base_parameters": footprint.parameters,
        "quantized_elements": footprint.stored_elements,
        "bytes": {**footprint.categories, "adapters": adapter_bytes},
        "adapters": rows,
        "memory": memory,
        "tokens": tokens,
        "stacks": [_stack(name, stack, footprint, memory, adapter_bytes, tokens) for name, stack in by_name.items()],
        "plan": _merged(by_name),
    }


def _footprint(base: BaseConfig, config: Any) -> tuple[Any, Footprint]:
    """The quantization config of a base, given or its own, and the footprint that the base has with it."""
    import torch
    from transformers import BitsAndBytesConfig

    from lorarep_runtime.model.footprint import footprint
    from lorarep_runtime.model.model_config import quantization_of

    _, quantization = quantization_of(config, base)
    own = getattr(config, "quantization_config", None)
    if own is not None:
        quantization = BitsAndBytesConfig.from_dict(own if isinstance(own, dict) else own.to_dict())
    return quantization, footprint(config, quantization, None if base.dtype == "auto" else getattr(torch, base.dtype))


def _adapter(
    source: AdapterSource, base: str, footprint: Footprint, cache_dir: Path | None, progress: Progress
) -> tuple[Stack, dict[str, Any]]:
    """The stack of an adapter, and its row of the table, from its configuration and its file header."""
    from lorarep_runtime.adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_config
    from lorarep_runtime.adapters.header import Expected, layout_of
    from lorarep_runtime.adapters.look import AdapterLook, fitting_header, naming_bases
    from lorarep_runtime.adapters.peft_config import AdapterConfig
    from lorarep_runtime.hub.snapshot import fetch
    from lorarep_runtime.model.compiled_adapter import file_parameters, storage_bytes

    def expected(folder: Path) -> Expected:
        config = AdapterConfig.parse(read_config(folder / CONFIG_FILE), AdapterLimits(), footprint.family)
        with naming_bases(config, base):
            stack = config.stack(footprint.layers)
            modules, parameters = footprint.layer_modules, footprint.layer_parameters
            layout = layout_of(config, stack, modules, parameters, footprint.prefix, footprint.ends)
            return Expected(config, stack, layout, footprint.ends)

    look = AdapterLook(expected, footprint.prefix, base)
    snapshot = fetch(source.source, source.revision, kind="adapter", cache_dir=cache_dir, progress=progress, look=look)
    found = look.expected(snapshot.folder)
    stack, (_, layout) = found.stack, fitting_header(snapshot.folder / WEIGHTS_FILE, found, footprint.prefix, base)
    return stack, {
        "name": source.name,
        "commit": snapshot.commit,
        "positions": len(stack),
        "adapter_parameters": file_parameters(layout),
        "total_parameters": footprint.parameters + file_parameters(layout),
        "bytes": storage_bytes(layout, footprint.dtype),
        "cpu_only": bool(found.config.alora_invocation_tokens)
        or any(position < 0 or form.file_module for (position, _), form in layout.items()),
    }


def _stack(
    name: str, stack: Stack, footprint: Footprint, memory: int, adapter_bytes: int, tokens: int
) -> dict[str, Any]:
    """The row of one stack: its ranges, KV bytes, and the number of sequences that fit."""
    from lorarep_runtime.model.stack import ranges_of

    return {
        "name": name,
        "positions": len(stack),
        "ranges": ranges_of(stack),
        "kv_bytes_per_token": footprint.kv_bytes(len(stack), 1) // PAGE_TOKENS,
        "sequences": footprint.sequences(memory, adapter_bytes, len(stack), tokens),
    }


def _merged(by_name: dict[str, Stack]) -> dict[str, Any]:
    """The merged plan of all stacks: its visits, and the visits that merging saves."""
    from lorarep_runtime.model.plan import merge

    merged: Plan = merge(tuple(sorted(set(by_name.values()))))
    depths = sum(len(stack) for stack in merged.stacks)
    index = {stack: i for i, stack in enumerate(merged.stacks)}
    return {
        "weight_passes": len(merged.visits),
        "weight_passes_saved": depths - len(merged.visits),
        "layers": [visit.layer for visit in merged.visits],
        "positions": {
            name: [visit.positions[index[stack]] for visit in merged.visits] for name, stack in by_name.items()
        },
    }


def render(counted: dict[str, Any]) -> str:
    """The computed values as text."""
    gib, merged = 1 << 30, counted["plan"]
    lines = [
        f"{counted['base']} at {counted['commit']}, {counted['quantization']}, {counted['dtype']}",
        f"  parameters {counted['base_parameters']:>24,}",
        f"  stored elements {counted['quantized_elements']:>19,}",
        "",
        *(f"  {name.replace('_', ' '):24}{size / gib:10.3f} GiB" for name, size in counted["bytes"].items()),
        f"  {'total':24}{sum(counted['bytes'].values()) / gib:10.3f} GiB, without keys and values",
        "",
    ]
    for row in counted["adapters"]:
        lines += [
            f"adapter {row['name']} at {row['commit']}",
            f"  {row['positions']} positions, {row['adapter_parameters']:,} parameters, {row['bytes'] / gib:.3f} GiB",
            f"  {row['total_parameters']:,} parameters with the base",
            *([CPU_ONLY] if row["cpu_only"] else []),
            "",
        ]
    fits = f"sequences of {counted['tokens']} tokens in {counted['memory'] / gib:g} GiB"
    width = max(16, *(len(stack["name"]) + 2 for stack in counted["stacks"]))
    lines.append(f"{'stack':{width}}{'positions':>10}{'KV bytes/token':>16}   {fits:>36}   ranges")
    for stack in counted["stacks"]:
        ranges = ",".join(f"{start}-{end}" for start, end in stack["ranges"])
        lines.append(
            f"{stack['name']:{width}}{stack['positions']:>10}{stack['kv_bytes_per_token']:>16,}"
            f"   {stack['sequences']:>36,}   {ranges}"
        )
    lines += [
        "",
        f"merged walk: {merged['weight_passes']} weight passes a step for all of them, "
        f"{merged['weight_passes_saved']} fewer than one after the other",
        "",
        f"{'layer':{width}}" + "".join(f"{layer:4}" for layer in merged["layers"]),
    ]
    for name, positions in merged["positions"].items():
        lines.append(f"{name:{width}}" + "".join(f"{'·' if p is None else p:>4}" for p in positions))
    return "\n".join(lines)
