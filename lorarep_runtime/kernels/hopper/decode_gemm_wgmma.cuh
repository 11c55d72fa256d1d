// The main loop of four warps that multiply together, by wgmma.m64nNk16: for more rows of x.
//
// Half a chunk is multiplied while the A of the next half is made. A chunk is finished, scaled and its registers loaded
// anew, while the next one begins. The last of DEPTH chunks waits for its own products. If products ran past the end of
// the loop, the compiler would insert a wait behind each product.
#pragma once

#include "decode_gemm_fragments.cuh"
#include "decode_gemm_sums.cuh"
#include "wgmma.cuh"

static_assert(TILES == 1 && DEPTH % 2 == 0, "");

struct WgmmaLoop {
    static constexpr int STEPS = KIND == 4 && EIGHTS == 4 ? 1 : 2;  // of 16 columns in a group of products; registers limit them

    // References to the caller's variables, for the sake of the compiler: see WeightStream.
    WeightStream& weights;
    const Fragments& fragments;
    Sums& sums;
    u32& x_at;            // lower word of x's matrix descriptor
    Sums (&of_chunk)[2];  // sums of two chunks, which alternate
    u32 (&a)[2][STEPS * 4];

    // Begins the products of a half of chunk d of DEPTH. All groups of products but the latest are then complete.
    __device__ __forceinline__ void begin(int d, int half) {
#pragma unroll
        for (int first = 0; first < 2; first += STEPS) {
            auto& own = a[STEPS == 1 ? first : half];
            u32 all[8];
            fragments.make(all, weights.bytes[d][0], half);
            for (int q = 0; q < STEPS * 4; q++) own[q] = all[first * 4 + q];
            begin_wgmma();
#pragma unroll
            for (int k = 0; k < STEPS; k++)
                wgmma(KIND == 4 ? of_chunk[d % 2][0] : sums[0], own + k * 4,
                      x_at + d * ROWS * 8 + half * 4 + (first + k) * 2, KIND != 4 || half + first + k > 0);
            commit_wgmma();
            await_wgmma<1>();
        }
    }

    // NF4: adds the sums of chunk d of DEPTH, times its scales, to the sums of the round.
    __device__ __forceinline__ void finish(int d) {
        if (KIND == 4) pin(of_chunk[d % 2][0]), add_scaled(sums, of_chunk[d % 2], weights.scale[d]);
    }

    // Multiplies `left` chunks of the stream.
    __device__ __forceinline__ void run(int& left) {
        for (; left >= DEPTH; left -= DEPTH) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                weights.prefetch(d, d + FETCH < left);
                begin(d, 0);
                if (d > 0) finish(d - 1), weights.load(d - 1, DEPTH, d - 1 + DEPTH < left);
                begin(d, 1);
            }
            await_wgmma<0>();
            finish(DEPTH - 1), weights.load(DEPTH - 1, DEPTH, DEPTH - 1 + DEPTH < left);
            x_at += DEPTH * ROWS * 8;
            weights.advance();
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            if (d < left) {
                begin(d, 0), begin(d, 1);
                await_wgmma<0>();
                finish(d);
            }
        if (KIND != 4) pin(sums[0]);
    }
};

// Adds the products of `left` chunks with x to the sums. `x` is the address of x in shared memory.
// `x` and `left` are references for the sake of the compiler: see WeightStream.
__device__ __forceinline__ void multiply(
    WeightStream& weights, const Fragments& fragments, Sums& sums, const u32& x, int& left
) {
    u32 x_at = 1u << 16 | (x & 0x3ffff) >> 4;
    Sums of_chunk[2] = {};
    u32 a[2][WgmmaLoop::STEPS * 4];
    WgmmaLoop{weights, fragments, sums, x_at, of_chunk, a}.run(left);
}
