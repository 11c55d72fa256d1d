// The copy of x from global memory to a CTA's shared memory.
#pragma once

#include "decode_gemm_cta.cuh"

// Copies a CTA's columns of x to shared memory, in the order in which tensor cores read them. The warps that multiply call it.
//
// Shared memory holds (chunks, ROWS, 64) bf16 in PTX's 128-byte swizzle: unit u of 16 bytes of row m is at u ^ m % 8. The same
// unit of eight rows is thus in different banks. A thread copies the same eight columns of one row of every APART-th chunk.
__device__ __forceinline__ void stage_x(const GemmArguments& args, u32 x, int begin, int chunks) {
    constexpr int APART = WARPS * 4 / ROWS;
    static_assert(APART * ROWS == WARPS * 4, "");
    const int eight = threadIdx.x % 8, m = threadIdx.x / 8 % ROWS, first = threadIdx.x / 8 / ROWS;
    const bool there = m < args.rows;
    const u16* from = args.x + i64(there ? m : 0) * args.columns + (begin + first) * CHUNK + eight * 8;
    u32 to = x + (first * ROWS + m) * 128;
#if KIND != 16
    to += (eight ^ m % 8) * 16;
#pragma unroll 8
    for (int chunk = first; chunk < chunks; chunk += APART) {
        copy16(to, from, there ? 16 : 0);
        from += APART * CHUNK, to += APART * ROWS * 128;
    }
    await_copies();
#else
    // A lane of the A operand loads 16 neighbouring columns. Their pairs of x move to the columns 2t and 2t + 8 of each 16.
    const int half = eight / 4;
    to += eight % 4 * 4;
    constexpr int AT_ONCE = 4;  // chunks loaded together; more would need registers that hold weights
    for (int chunk = first; chunk < chunks; chunk += AT_ONCE * APART) {
        uint4 v[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            v[u] = make_uint4(0, 0, 0, 0);
            if (there && chunk + u * APART < chunks) v[u] = *reinterpret_cast<const uint4*>(from + u * APART * CHUNK);
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            if (chunk + u * APART >= chunks) continue;
            const u32 words[4] = {v[u].x, v[u].y, v[u].z, v[u].w};
#pragma unroll
            for (int q = 0; q < 4; q++)
                store_shared(to + u * APART * ROWS * 128 + (half * 4 + q ^ m % 8) * 16, words[q]);
        }
        from += AT_ONCE * APART * CHUNK, to += AT_ONCE * APART * ROWS * 128;
    }
#endif
    if (WGMMA) fence_proxy_async();
    sync<GEMM_WARPS>();
}
