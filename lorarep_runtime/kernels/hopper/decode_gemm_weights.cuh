// The stream of a weight's chunks, with their scales, from global memory to a warp's registers.
#pragma once

#include "decode_gemm_cta.cuh"

// Most members are references to the caller's variables. With variables of its own, the compiler schedules the instructions
// otherwise: the SASS was compared.
struct WeightStream {
    const GemmArguments& args;
    const int &warp, &lane, &g, &t;
    const int &all_chunks, &begin, &chunks;  // chunks of a tile; the CTA's first chunk; the CTA's number of chunks
    const u64& policy;
    const i64& row;  // stride of the rows of a bf16 weight, in units of 16 bytes
    const uint4* (&w)[TILES];
    const float* (&s)[TILES];
    uint4 (&bytes)[DEPTH][TILES][PLANES];
    float2 (&scale)[DEPTH][TILES];
    const char* line;  // address that the lane prefetches next; line_step bytes lead to the next chunk
    u32 line_step;

    // Loads the chunk d + `ahead` of the warp's tiles into the registers d of DEPTH.
    __device__ __forceinline__ void load(int d, int ahead, bool wanted) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int p = 0; p < PLANES; p++) {
                const i64 plane = KIND == 16 ? p / 2 * 8 * row + p % 2 * 4 : p * 32;
                load_once(bytes[d][i][p], w[i] + plane + (d + ahead) * STEP, wanted, policy);
            }
            if (KIND == 4)
                load_once(scale[d][i], reinterpret_cast<const float2*>(s[i] + (d + ahead) * 16), wanted, policy);
        }
    }

    // Prefetches NF4's chunk d behind `line` to the L2 cache. Chunks of int8 and bf16 would fill the cache.
    __device__ __forceinline__ void prefetch(int d, bool wanted) const {
        if (KIND == 4) prefetch_L2(line + d * line_step, wanted);
    }

    // Moves the stream on by DEPTH chunks.
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int i = 0; i < TILES; i++) w[i] += DEPTH * STEP, s[i] += DEPTH * 16;
        line += DEPTH * line_step;
    }

    // Begins to load a round's first chunks; returns the number of chunks that the warp multiplies.
    __device__ __forceinline__ int start(const Round& round) {
        point_at(round);
        const bool mine = warp * TILES / UNIT * UNIT < round.tiles;
#pragma unroll
        for (int d = DEPTH; d < FETCH; d++) prefetch(d, mine && d < chunks);
        line += FETCH * line_step;
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                for (int p = 0; p < PLANES; p++) bytes[d][i][p] = make_uint4(0, 0, 0, 0);
                scale[d][i] = make_float2(0, 0);
            }
            load(d, 0, mine && d < chunks);
        }
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (KIND == 8) scale[0][i] = make_float2(s[i][0] * (1.0f / 127), s[i][8] * (1.0f / 127));
        return mine ? chunks : 0;
    }

    // Warps without a tile of their own point at the last one, so that addresses are valid.
    __device__ __forceinline__ void point_at(const Round& round) {
        const i64 tile = min(round.tile + warp * TILES + lane / 8 % TILES, args.tiles - 1);
        const bool scales = lane % 8 == 4;
        const i64 at = tile * all_chunks + begin;
        line = scales ? reinterpret_cast<const char*>(args.scales + at * 16)
                      : reinterpret_cast<const char*>(args.weights + at * 32) + lane % 4 * 128;
        line_step = scales ? 64 : 512;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const i64 at = min(round.tile + warp * TILES + i, args.tiles - 1);
            w[i] = KIND == 16 ? args.weights + (at * 16 + g) * row + begin * STEP + t
                              : args.weights + (at * all_chunks + begin) * STEP + lane;
            s[i] = args.scales + (KIND == 4 ? (at * all_chunks + begin) * 16 + 2 * g : at * 16 + g);
        }
    }
};
