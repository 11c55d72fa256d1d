"""All that is compiled, loaded or captured before the server is ready, so that no request waits for it.

To load a kernel the device stands still, and to compile one takes seconds. In the order of time:

1. While the base's weights are loaded, `model.packed.kernels_compiled` compiles the GEMMs and the adapters' kernels.
2. `prepare_device`, before KV pages take the memory that is left: the stack of threads, and the kernels that compile
   adapters.
3. `warm_up`, once there are pages: the kernels of prompts and of decode steps, and the steps' graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch

from lorarep_runtime.gpu.adapted_linear import PackedLinear, PortableLinear
from lorarep_runtime.gpu.buffers import LEAST_RANKS, rank_classes
from lorarep_runtime.gpu.graphs import MOST_GRAPHS
from lorarep_runtime.kernels.entry_table import ENTRY_FIELDS
from lorarep_runtime.kernels.hopper import prefill_gemm
from lorarep_runtime.kernels.hopper.packed_weight import compile_gemms
from lorarep_runtime.kernels.prefill.adapt_segments import SegmentTiles, adapt_segments
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PageTable
from lorarep_runtime.model.plan import merge
from lorarep_runtime.model.stack import Stack
from lorarep_runtime.progress import Progress

if TYPE_CHECKING:
    from lorarep_runtime.gpu.decoder import Decoder


def prepare_device(device: torch.device, load_kernels: Callable[[], None]) -> None:
    """Limits the stack of the device's threads, loads the kernels that compile adapters, and frees unused memory.

    Args:
        load_kernels: launches each of those kernels once.
    """
    from lorarep_runtime.kernels.hopper.nvrtc import limit_stack

    limit_stack()
    load_kernels()
    torch.cuda.synchronize(device)  # adapters are loaded on another stream, which uses memory that is kept of this
    torch.cuda.empty_cache()


def warm_up(decoder: Decoder, stacks: Collection[Stack], max_rank: int, progress: Progress | None = None) -> None:
    """Compiles a decoder's kernels and captures its steps over each stack for every number of rows.

    Kernels are compiled for all ranks that an adapter may have. Only a mix whose ranks are more in all compiles others,
    with its first step.

    Args:
        stacks: where they would be more than MOST_GRAPHS graphs, the first ones are captured.
        max_rank: largest rank of an adapter.
        progress: told of graphs, as stage "capture".
    """
    if decoder.base.device.type == "cuda":
        _load_kernels(decoder)
    memory, graphs = decoder.memory, decoder.graphs
    kinds = [*((rows, False) for rows in memory.buckets), *((rows, True) for rows in memory.prompt_buckets)]
    depth = min(map(len, stacks))
    for ranks in dict.fromkeys(map(memory.ranks, rank_classes(max_rank))):
        for rows, shares in kinds:
            for tokens in (1, memory.max_tokens):  # long sequences are split into more parts
                graphs.compile(memory.views(rows, ranks, tokens, depth, shares_sequences=shares))
    todo = [(stack, *kind) for stack in stacks for kind in kinds][:MOST_GRAPHS]
    for done, (stack, rows, shares) in enumerate(todo, 1):
        # Graphs of larger ranks and of long sequences are captured when there are such sequences.
        graphs.graph(merge((stack,)), memory.views(rows, LEAST_RANKS, 1, len(stack), shares_sequences=shares))
        if progress is not None:
            progress("capture", done, len(todo))


def _load_kernels(decoder: Decoder) -> None:
    """Compiles and loads the GEMMs, and the kernels of prompts."""
    from lorarep_runtime.kernels.hopper.nvrtc import prefer_shared_memory

    linears = [projection.linear for layer in decoder.layers for projection in layer.projections]
    bits = {linear.packed.bits for linear in linears if isinstance(linear, PackedLinear)}
    if bits:
        compile_gemms(bits)
    if 4 in bits:
        prefill_gemm.load()
    portable = (linear.packed for linear in linears if isinstance(linear, PortableLinear))
    for packed in {(p.bits, p.columns, p.sizes): p for p in portable}.values():
        packed.load_kernels(decoder.base.dtype)
    _prefill_two_tokens(decoder)
    _adapt_two_tokens(decoder)
    if bits == {4}:  # weights of more bits are loaded by so much at once that their kernels need the L1 cache
        prefer_shared_memory()


def _prefill_two_tokens(decoder: Decoder) -> None:
    """Launches the kernels of a prompt of two tokens, without an adapter, through one layer."""
    table = PageTable(decoder.pool, 1)
    table.grow(2)
    decoder.prefill(Batch([Span([0, 0], 0, (0,), None, table)], decoder.base.device)).advance(1)
    table.release()


def _adapt_two_tokens(decoder: Decoder) -> None:
    """Launches the kernels that adapt rows of prompts, for a tile without rows."""
    base, memory = decoder.base, decoder.memory
    device, modules = base.device, len(base.modules)
    buffers = memory.views(memory.buckets[-1], LEAST_RANKS, 1, base.layers).layers
    entries = torch.zeros(modules * ENTRY_FIELDS, dtype=torch.int64, device=device)
    none = torch.zeros(1, 2, dtype=torch.int32, device=device)
    addresses = torch.tensor([entries.data_ptr()], device=device)
    tiles = SegmentTiles(none, addresses, none[0, :1], LEAST_RANKS, modules)
    adapt_segments(buffers.x, buffers.out, [buffers.out.shape[1]], tiles, 0)
    torch.cuda.synchronize(device)  # before the entries go
