"""Weights as the kernel reads them: bitsandbytes' values to the bit, and on a GPU their product with each row's own
adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from lorarep_runtime.config import Quantization
from lorarep_runtime.kernels.entry_table import DecodeRows, Entry, ReferenceRows, entry_table
from lorarep_runtime.kernels.hopper import decode_gemm, int8, nf4, packed_weight, prefill_gemm
from lorarep_runtime.kernels.hopper.decode_gemm import decode_gemm_reference
from lorarep_runtime.kernels.hopper.launch_config import (
    CTA_BYTES,
    LAUNCH_CONFIGS,
    SHARED_BYTES,
    clusters_at_once,
    launch_config_for,
    places_for,
)
from lorarep_runtime.kernels.hopper.nf4 import CHUNK, TILE, arrange
from lorarep_runtime.kernels.hopper.nvrtc import CudaError, compile_source
from lorarep_runtime.kernels.hopper.packed_weight import PackedWeight
from lorarep_runtime.model.packed import BITS as BITS_OF
from lorarep_runtime.model.packed import PackedPart, norm_products, row_squares
from lorarep_runtime.model.packed import pack as pack_weights
from lorarep_runtime.model.weights import NF4Weight
from tests.support.decode_rows import one_by_one

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SIZES = (256, 64, 48)
BITS = (4, 8, 16)
SHAPES = [(6144, 4096, 3), (4096, 4096, 1), (28672, 4096, 2), (4096, 14336, 1), (8192, 28672, 1), (368, 128, 3)]


def random_weight(out: int, into: int) -> Tensor:
    generator = torch.Generator().manual_seed(out)
    return torch.randn(out, into, generator=generator).bfloat16().to("cuda" if HOPPER else "cpu")


def quantized(out: int, into: int) -> tuple[Tensor, bnb.functional.QuantState]:
    return bnb.functional.quantize_4bit(random_weight(out, into), quant_type="nf4")


def test_tiles_are_the_same_bytes_and_scales() -> None:
    packed, state = quantized(48, 192)
    tiles, scales = arrange(packed, state.absmax, (48, 192))
    assert (tiles.shape, scales.shape) == ((3, 3, 32, 16), (3, 3, 8, 2))
    # By the layout's definition: lane (g, t) holds what PTX's mma wants of a row, 2t, 2t + 1, 2t + 8, 2t + 9 of each 16
    # columns, for the rows g and g + 8 of its tile, two columns to a byte.
    rows, row_scales = packed.view(48, 192 // 2), state.absmax.view(48, 192 // CHUNK)
    for tile, chunk, g, half in product(range(3), range(3), range(8), range(2)):
        row = tile * TILE + g + 8 * half
        assert scales[tile, chunk, g, half] == row_scales[row, chunk]
        for t in range(4):
            columns = [chunk * CHUNK + 16 * k + 2 * t + 8 * h for k in range(4) for h in range(2)]
            assert torch.equal(tiles[tile, chunk, 4 * g + t].view(2, 8)[half], rows[row, [c // 2 for c in columns]])


def test_tiles_of_int8_are_the_same_numbers() -> None:
    rows = torch.randint(-127, 128, (48, 192), dtype=torch.int8)
    tiles = int8.arrange(rows)
    assert tiles.shape == (3, 3, 2, 32, 16)
    for tile, chunk, half, g, t in product(range(3), range(3), range(2), range(8), range(4)):
        columns = [chunk * CHUNK + 16 * k + 2 * t + 8 * h + i for k in range(4) for h in range(2) for i in range(2)]
        assert torch.equal(tiles[tile, chunk, half, 4 * g + t], rows[tile * TILE + g + 8 * half, columns])
    assert torch.equal(int8.rows_of(tiles), rows)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 32, 45])
@pytest.mark.parametrize(("out", "into", "modules"), SHAPES)
def test_every_shape_has_a_launch_config_that_fits(bits: int, rows: int, out: int, into: int, modules: int) -> None:
    launch = launch_config_for(bits, out // TILE, into, rows, modules, 64)
    taken = min(rows, 8 * launch.eights)
    assert taken == min(rows, 32) or into > 20_000  # of such wide ones x leaves no room for more
    tiles, clusters = out // TILE, launch.grid(out // TILE) // launch.cluster
    assert clusters <= clusters_at_once(launch.cluster)
    assert clusters * launch.cluster_tiles(tiles) >= tiles
    assert launch.warps * launch.tiles >= launch.round_tiles(tiles)
    assert launch.rounds(tiles) * launch.round_tiles(tiles) >= launch.cluster_tiles(tiles)
    assert places_for(launch, tiles, into, taken, modules).end <= SHARED_BYTES - CTA_BYTES
    assert launch.stride(tiles) % 8 == 4
    assert launch.stride(tiles) * launch.cluster >= launch.round_tiles(tiles) * TILE


@pytest.mark.parametrize(
    ("file", "defines"),
    [
        (nf4.SOURCE, {}),
        (int8.SOURCE, {}),
        *prefill_gemm.sources(),
        *(source for bits in BITS for source in decode_gemm.sources(bits)),
    ],
    ids=str,
)
def test_the_source_compiles(file: Path, defines: Mapping[str, int], caplog: pytest.LogCaptureFixture) -> None:
    """By NVRTC, which needs no GPU. It warns where it has wgmma wait for one another."""
    compiled = compile_source.__wrapped__(file, tuple(sorted(defines.items())), "sm_90a")
    assert compiled.startswith(b"\x7fELF")
    assert not caplog.messages
    assert all(bytes([n])[0] == n for n in range(256)), "an empty log is in none of the interpreter's own bytes"


def test_what_the_compiler_says_is_told(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("void f() { no_such_thing(); }")
    with pytest.raises(CudaError, match="no_such_thing"):
        compile_source(source, (), "sm_90")


def test_the_reference_is_one_form_over_a_plain_product() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(8, 6, generator=generator), torch.randn(2, 6, generator=generator)
    entry = Entry(*(torch.randn(s, generator=generator) for s in ((3, 6), (8, 3), (8,), (8,))))
    y = torch.full((2, 8), 5.0)
    shrunk = torch.stack([entry.A @ row for row in x]).view(2, 1, 1, 3)
    decode_gemm_reference(
        weight, x, y, shrunk, ReferenceRows([0, -1], [{(0, "m"): entry}, None], ["m"]), 0, [8], add=True
    )
    assert entry.c is not None
    expected = 5 + entry.c * (weight @ x[0]) + entry.B @ (entry.A @ x[0]) + entry.bias
    torch.testing.assert_close(y[0], expected)
    assert (y[1] == 5).all()


def pack(bits: int, sizes: Sequence[int], into: int) -> tuple[PackedWeight, Tensor]:
    """A group, and its weights as bitsandbytes dequantizes them."""
    weights = [random_weight(size, into) for size in sizes]
    if bits == 16:
        return PackedWeight(bits, torch.cat(weights), None, tuple(sizes)), torch.cat(weights)
    if bits == 8:
        rows, scales, _ = bnb.functional.int8_vectorwise_quant(torch.cat(weights).half())
        dense = bnb.functional.int8_vectorwise_dequant(rows, scales).bfloat16()
        return PackedWeight(bits, int8.arrange(rows), scales, tuple(sizes)), dense
    packed = [bnb.functional.quantize_4bit(weight, quant_type="nf4") for weight in weights]
    tiled = [arrange(p, state.absmax, (size, into)) for (p, state), size in zip(packed, sizes, strict=True)]
    tiles, scales = (torch.cat(tensors) for tensors in zip(*tiled, strict=True))
    dense = torch.cat([bnb.functional.dequantize_4bit(p, state) for p, state in packed])
    return PackedWeight(bits, tiles, scales, tuple(sizes)), dense


@pytest.mark.parametrize(("limit", "count"), [(1 << 20, 1), (96 * 64 * 2 // 2, 2), (1, 6)])
def test_many_rows_take_a_weight_part_by_part(limit: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weight, "DENSE_BYTES", limit)
    x = random_weight(3, 64)
    for bits in [8, 16]:
        group, dense = pack(bits, (64, 32), 64)
        assert len([*group._output_blocks()]) == (1 if bits == 16 else count)
        assert torch.equal(torch.cat([block.dense() for block in group._output_blocks()]), dense)
        y = x.new_empty(3, 96)
        group.matmul(x, y)
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["int8", "none", *["nf4"] * HOPPER])
@pytest.mark.parametrize("ranks", [1, 8, 100])
def test_norms_of_what_adapters_make_of_weights(
    kind: Quantization, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weight, "DENSE_BYTES", 96 * 256)
    group, dense = pack(BITS_OF[kind], (128, 128, 48), 192)
    q, k, _ = (PackedPart(group, i, kind) for i in range(3))
    generator = torch.Generator().manual_seed(ranks)
    a, b = (torch.randn(s, generator=generator).to(dense.device) for s in ((3, ranks, 192), (3, 128, ranks)))
    squares = torch.stack([row_squares(weight, torch.bfloat16) for weight in (q, k, q)])
    products = norm_products([q, k, q], a, torch.bfloat16)
    norms = (squares + (b * (2 * products.mT + b @ a @ a.mT)).sum(2)).sqrt()
    plain = torch.stack([dense[:128], dense[128:256], dense[:128]]).double()
    expected = (plain + b.double() @ a.double()).norm(dim=2)
    assert (expected - plain.norm(dim=2)).norm() > 0.01 * expected.norm()
    assert (norms - expected).norm() < 1e-3 * expected.norm()


if HOPPER:

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize(("sizes", "into"), [((256, 64, 48), 128), ((4096,), 4096), ((512, 512), 14336)])
    def test_dequantized_to_the_bit(bits: int, sizes: Sequence[int], into: int) -> None:
        group, expected = pack(bits, sizes, into)
        assert torch.equal(group.dense(), expected)
        last = len(sizes) - 1
        assert torch.equal(group.module(last).dense(torch.float32).bfloat16(), expected[-sizes[last] :])

    def test_double_quantized_weights_are_dequantized_to_the_bit() -> None:
        weights = [random_weight(size, 4096) for size in (256, 64)]
        twice = [bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in weights]
        dense = pack_weights([NF4Weight(*one) for one in twice]).dense()
        assert torch.equal(dense, torch.cat([bnb.functional.dequantize_4bit(*one) for one in twice]))

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("count", [1, 3, 8, 13, 16, 32, 45])
    @pytest.mark.parametrize("add", [False, True])
    @pytest.mark.parametrize(("into", "most"), [(128, 8), (1024, 64), (4096, 100), (28672, 8)])
    def test_decode(bits: int, count: int, add: bool, into: int, most: int) -> None:
        check(bits, count, add, into, most)

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("count", [3, 13, 32])
    @pytest.mark.parametrize(("cluster", "clusters", "warps"), [(1, 2, 0), (3, 1, 0), (7, 1, 8), (8, 2, 8), (2, 1, 8)])
    def test_rounds_and_any_cluster(
        monkeypatch: pytest.MonkeyPatch, bits: int, count: int, cluster: int, clusters: int, warps: int
    ) -> None:
        launch = LAUNCH_CONFIGS[bits][1 if count <= 8 else 2 if count <= 16 else 4]
        launch = replace(launch, cluster=cluster, warps=warps or launch.warps)
        monkeypatch.setattr(decode_gemm, "launch_config_for", lambda *_, **__: launch)
        monkeypatch.setattr("lorarep_runtime.kernels.hopper.launch_config.clusters_at_once", lambda *_: clusters)
        monkeypatch.setattr(decode_gemm, "places_for", places_for.__wrapped__)  # it remembers other devices
        assert launch.grid(sum(SIZES) // TILE) == cluster * clusters
        check(bits, count, True, 1024, 100)

    def check(bits: int, count: int, add: bool, into: int, most: int) -> None:
        generator = torch.Generator("cuda").manual_seed(count)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda")

        def adapter(seed: int) -> dict[tuple[int, str], Entry]:
            entries = {}
            for position in range(2):
                for i, (module, size) in enumerate(zip(MODULES, SIZES, strict=True)):
                    rank = (most, 1, 13, 8)[(seed + position + i) % 4]
                    if (seed + i) % 5 == 4 or rank > most:
                        continue
                    A, B = noise(rank, into).bfloat16(), noise(rank, size).bfloat16()
                    c = (1 + 0.5 * noise(size)).bfloat16() if seed % 2 else None
                    entries[position, module] = Entry(A, B.T, c, noise(size).bfloat16() if seed % 3 == 0 else None)
            return entries

        adapters = [None if row % 7 == 6 else adapter(row) for row in range(count)]
        tables = [None if a is None else entry_table(one_by_one(a), 2, MODULES).cuda() for a in adapters]
        positions = [(-1, 0, 1)[row % 3] if count > 1 else 1 for row in range(count)]
        rows = DecodeRows(
            torch.tensor(positions, dtype=torch.int32, device="cuda"),
            torch.tensor([0 if t is None else t.data_ptr() for t in tables], device="cuda"),
            len(MODULES),
        )
        shrunk = torch.full((count, 4, len(MODULES), most), torch.nan, device="cuda")
        for row, position in enumerate(positions):
            for i, module in enumerate(MODULES):
                entry = (adapters[row] or {}).get((position, module))
                if entry is not None:
                    shrunk[row, :, i, : len(entry.A)] = noise(4, len(entry.A))
        group, dense = pack(bits, SIZES, into)
        x, y, bias = noise(count, into).bfloat16(), noise(count, sum(SIZES)).bfloat16(), noise(sum(SIZES)).bfloat16()
        expected = y.clone()
        plain = ReferenceRows(positions, adapters, MODULES)
        decode_gemm_reference(dense, x, expected, shrunk, plain, 0, SIZES, bias=bias, add=add)
        untouched = y[[p < 0 for p in positions]].clone()
        group.decode(x, y, shrunk, rows, 0, bias=bias, add=add)
        assert torch.equal(y[[p < 0 for p in positions]], untouched)
        for row in (row for row, position in enumerate(positions) if position >= 0):
            error = (y[row].float() - expected[row].float()).norm() / expected[row].float().norm()
            assert error < 6e-3, row
