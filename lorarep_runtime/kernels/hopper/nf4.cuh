// The sixteen numbers of NF4 (QLoRA, Dettmers et al., 2023), with bitsandbytes' digits, and their look-up by pairs.
#pragma once

#include "ptx.cuh"

__constant__ float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Looks up byte I of a word, two NF4 codes, in the lane's copy of a table: the result is two bf16 numbers. `place` is the
// address of the lane's first entry; a look-up takes one shift, one logical operation and one load.
template <int I>
__device__ __forceinline__ u32 lookup(u32 place, u32 word) {
    u32 r;
    asm("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"((I == 0 ? word << 7 : word >> (8 * I - 7)) & 0x7f80 | place));
    return r;
}
