"""NF4 weights as the portable kernels read them.

bitsandbytes packs an NF4 weight (out, in) row by row, two numbers a byte, the first in the high half, with an fp32
scale for each 64 (QLoRA, Dettmers et al., 2023). The kernels read the same codes and scales in another order. A word
has four codes, 32 columns apart, so that each of its nibbles is an operand of a product of its own: no code moves from
one thread to another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorarep_runtime.integers import ceil_div

TILE = 16
"""Outputs, rows of a weight, in a tile."""
BLOCK = 64
"""Columns that share a scale."""
CHUNK = 128
"""Columns of a chunk."""
WORDS = 32
"""Words of an output in a chunk: word t has the columns t, 32 + t, 64 + t and 96 + t, the first in its lowest bits."""
ZERO = 7
"""The code of 0."""
CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The sixteen numbers of NF4, with bitsandbytes' digits."""


def arrange(packed: Tensor, scales: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """An NF4 weight from bitsandbytes' order to words. The last chunk is filled with zeros.

    Args:
        packed: uint8, out · in / 2 bytes.
        scales: fp32, out · in / 64.
        shape: (out, in), multiples of 16 and 64.

    Returns:
        int16 (tiles, chunks, 16, 32) and fp32 (tiles, 2 · chunks, 16).
    """
    out, into = shape
    tiles, chunks = out // TILE, ceil_div(into, CHUNK)
    bytes_ = packed.view(out, into // 2)
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 2).view(out, into)
    codes = F.pad(codes, (0, chunks * CHUNK - into), value=ZERO).view(tiles, TILE, chunks, CHUNK // WORDS, WORDS)
    pairs = codes[..., ::2, :] | codes[..., 1::2, :] << 4
    words = pairs.permute(0, 2, 1, 4, 3).contiguous().view(torch.int16).squeeze(-1)
    blocks = chunks * CHUNK // BLOCK
    own = F.pad(scales.view(out, into // BLOCK), (0, blocks - into // BLOCK))
    return words, own.view(tiles, TILE, blocks).permute(0, 2, 1).contiguous()


def sizes(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tensors without memory, of the sizes that `arrange` makes of a weight (out, in)."""
    tiles, chunks = shape[0] // TILE, ceil_div(shape[1], CHUNK)
    words = torch.empty(tiles, chunks, TILE, WORDS, dtype=torch.int16, device="meta")
    return words, torch.empty(tiles, chunks * CHUNK // BLOCK, TILE, device="meta")


def dense_reference(words: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The weight (out, in) in fp32, code times scale."""
    tiles, chunks = words.shape[:2]
    nibbles = torch.arange(0, 16, 4, device=words.device).view(-1, 1)
    codes = (words.unsqueeze(-2) >> nibbles & 15).permute(0, 2, 1, 3, 4).reshape(tiles * TILE, chunks * CHUNK)
    values = torch.tensor(CODES, device=words.device)[codes.long()]
    own = scales.permute(0, 2, 1).reshape(tiles * TILE, -1)
    return (values.view(*own.shape, BLOCK) * own.unsqueeze(-1)).flatten(1)[:, :columns]


def lookup_asm(dtype: torch.dtype) -> str:
    """PTX that looks up the codes of two words, the halves of $4, whose columns follow one another.

    The registers $0 to $3 become pairs of numbers of a 16-bit dtype, of the lower word's code and the upper one's, for
    each nibble. A table of 16 numbers is four tables of 8 bytes, which `prmt` (PTX ISA, 9.7.9.7) looks up four at a
    time, and selects from and interleaves as well: about three instructions a number, and no memory.
    """
    bits = torch.tensor(CODES).to(dtype).view(torch.uint8).view(16, 2)
    low, high = ([_word(bits[at : at + 4, half].tolist()) for at in range(0, 16, 4)] for half in range(2))
    lines = [
        "{",
        ".reg .b32 c, h, m, n, x, y;",
        # The codes of both words in turn.
        "shr.u32 m, $4, 4;",
        "shl.b32 n, $4, 4;",
        "prmt.b32 m, $4, m, 0x5140;",
        "prmt.b32 n, n, $4, 0x7362;",
        "lop3.b32 c, 0x0f0f0f0f, m, n, 0xca;",
        # From which half of the tables each number comes, and its place in there.
        "shr.u32 h, c, 1;",
        "and.b32 c, c, 0x77777777;",
        "lop3.b32 h, h, 0x44444444, 0x32103210, 0xea;",
    ]
    for pair in range(2):
        if pair:
            lines += ["shr.u32 c, c, 16;", "shr.u32 h, h, 16;"]
        for table, to in ((low, "x"), (high, "y")):
            lines += [f"prmt.b32 {half}, {table[at]}, {table[at + 1]}, c;" for half, at in (("m", 0), ("n", 2))]
            lines += [f"prmt.b32 {to}, m, n, h;"]
        lines += [f"prmt.b32 ${2 * pair}, x, y, 0x5140;", f"prmt.b32 ${2 * pair + 1}, x, y, 0x7362;"]
    return "\n".join([*lines, "}"])


def _word(bytes_: list[int]) -> str:
    return f"{int.from_bytes(bytes_, 'little'):#010x}"
