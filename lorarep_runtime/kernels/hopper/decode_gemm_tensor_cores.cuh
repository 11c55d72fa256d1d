// How a weight's bits become the numbers that tensor cores multiply.
#pragma once

#include "nf4.cuh"
#include "decode_gemm_group.cuh"
#include "wgmma.cuh"

// The bytes I and I + 1 of a word, signed, as bf16: 128 or 256 is taken from 128 and the lower seven bits, which is exact.
// `exponents` is 0x43 in each byte.
template <int I>
__device__ __forceinline__ u32 signed_pair(u32 word, u32 exponents) {
    const u32 both = __byte_perm(word, exponents, I == 0 ? 0x4140 : 0x4342);
    u32 r;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(both & 0xff7fff7f), "r"(both & 0xff80ff80));
    return r;
}
