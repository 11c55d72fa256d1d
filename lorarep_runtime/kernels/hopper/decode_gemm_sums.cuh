// The sums of a warp's tiles: (TILES, EIGHTS, 4) fp32 in a lane, as tensor cores leave them.
#pragma once

#include "decode_gemm_weights.cuh"

typedef float Sums[TILES][EIGHTS][4];

// Sets all sums to 0.
__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
            for (int q = 0; q < 4; q++) sums[i][e][q] = 0;
}

// NF4: adds a chunk's sums times the chunk's scales to `sums`.
__device__ __forceinline__ void add_scaled(Sums& sums, const Sums& of_chunk, const float2 (&scale)[TILES]) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            sums[i][e][0] += scale[i].x * of_chunk[i][e][0];
            sums[i][e][1] += scale[i].x * of_chunk[i][e][1];
            sums[i][e][2] += scale[i].y * of_chunk[i][e][2];
            sums[i][e][3] += scale[i].y * of_chunk[i][e][3];
        }
}

// int8: multiplies sums by the scales of their outputs.
__device__ __forceinline__ void scale_rows(Sums& sums, const float2 (&scale)[TILES]) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            sums[i][e][0] *= scale[i].x, sums[i][e][1] *= scale[i].x;
            sums[i][e][2] *= scale[i].y, sums[i][e][3] *= scale[i].y;
        }
}
