// The main loop of warps that multiply alone, by mma.m16n8k16: for few rows of x.
#pragma once

#include "decode_gemm_fragments.cuh"
#include "decode_gemm_sums.cuh"

// Adds the products of chunk d of DEPTH with x to the sums. `x_at` is the address of the lane's row of x in shared memory.
__device__ __forceinline__ void multiply_chunk(
    const WeightStream& weights, const Fragments& fragments, Sums& sums, u32 x_at, int d
) {
    Sums of_chunk = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 b[EIGHTS][4];
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) load_matrices(b[e], (x_at ^ half * 64) + d * ROWS * 128 + e * 1024);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            u32 a[8];
            fragments.make(a, weights.bytes[d][i], half);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                auto& to = KIND == 4 ? of_chunk[i][e] : sums[i][e];
                mma(to, a[0], a[1], a[2], a[3], b[e][0], b[e][1]);
                mma(to, a[4], a[5], a[6], a[7], b[e][2], b[e][3]);
            }
        }
    }
    if (KIND == 4) add_scaled(sums, of_chunk, weights.scale[d]);
}

// Adds the products of `left` chunks with x to the sums. `x` is the address of x in shared memory.
// `x` and `left` are references for the sake of the compiler: see WeightStream.
__device__ __forceinline__ void multiply(
    WeightStream& weights, const Fragments& fragments, Sums& sums, const u32& x, int& left
) {
    const int lane = weights.lane;
    u32 x_at = x + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
    for (; left >= DEPTH; left -= DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            weights.prefetch(d, d + FETCH < left);
            multiply_chunk(weights, fragments, sums, x_at, d);
            weights.load(d, DEPTH, d + DEPTH < left);
        }
        x_at += DEPTH * ROWS * 128;
        weights.advance();
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (d < left) multiply_chunk(weights, fragments, sums, x_at, d);
}
