#pragma once

#include "decode_gemm_cta.cuh"

// Brings a CTA's columns of x to shared memory, by the warps that multiply, as tensor cores read it: a chunk's rows under one
// another; each row's eight times 16 bytes change places by the row's number, so that the same 16 bytes of eight rows are in
// different banks (PTX's 128-byte swizzle). A thread has the same eight columns of the same row of every so many chunks.
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
    // Lane t's own neighbouring columns, two at a time, go where A has them: 2t and 2t + 8 of each 16.
    const int half = eight / 4;
    to += eight % 4 * 4;
    constexpr int AT_ONCE = 4;  // they wait for memory, but registers hold weights already
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
