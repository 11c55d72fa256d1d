// The end of a round of a decode GEMM: CTAs exchange their sums through distributed shared memory and write y.
#pragma once

#include "decode_gemm_sums.cuh"

// Sends a warp's sums of a round's tiles to the CTAs that finish their outputs. Each output has one owner in the cluster.
__device__ __forceinline__ void send(
    const GemmArguments& args, const Cta& cta, const Round& round, const Sums& sums
) {
    const u32 sums_at = u32(__cvta_generic_to_shared(cta.sums));
    const int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int n = (warp * TILES + i) * 16 + g + half * 8, owner = n / round.share;
            if (n >= round.tiles * 16) continue;
            const u32 to = map_cluster(sums_at + (cta.rank * ROWS * args.stride + n - owner * round.share) * 4, owner);
#pragma unroll
            for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    const int m = e * 8 + 2 * t + q;
                    if (m < args.rows) store_cluster(to + m * args.stride * 4, sums[i][e][half * 2 + q]);
                }
        }
    __syncwarp();
    if (lane < cta.size) arrive(cta.full, lane);
}

// Writes y of the CTA's outputs by COUNT threads. A thread takes two groups at once, each of four outputs of a row.
//
// The loads of biases, c and y precede the named barrier WHICH, behind which the adapters' part is complete. The sums of all
// CTAs have arrived when `full` has the phase `parity`.
template <int WHICH, int COUNT>
__device__ __forceinline__ void write_outputs(
    const GemmArguments& args, const Cta& cta, const Round& round, u32 parity, int thread
) {
    const int first = round.first_output(cta.rank);
    const int fours = round.outputs(cta.rank) / 4, all = fours * args.rows;
    const float by_fours = __fdividef(1, fours);
    for (int begin = 0; begin == 0 || begin < all; begin += 2 * COUNT) {
        uint2 base_bias[2], c[2], bias[2], y[2];
        Entry entry[2];
        int at[2];
        i64 to[2];
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int i = begin + u * COUNT + thread, m = (i + 0.5f) * by_fours, local = (i - m * fours) * 4, n = first + local;
            base_bias[u] = c[u] = bias[u] = y[u] = make_uint2(0, 0);
            entry[u].rank = -1;
            if (i >= all) continue;
            const Output of(args, n);
            entry[u] = cta.entries[m * args.modules + of.module];
            at[u] = m * args.stride + local, to[u] = i64(m) * (args.tiles * 16) + n;
            if (args.base_bias) base_bias[u] = load4(args.base_bias + n);
            if (entry[u].c) c[u] = load4(entry[u].c + of.inner);
            if (entry[u].bias) bias[u] = load4(entry[u].bias + of.inner);
            if (args.add) y[u] = load4(args.y + to[u]);
        }
        if (begin == 0) sync<WHICH, COUNT>(), await(cta.full, parity);
#pragma unroll
        for (int u = 0; u < 2; u++) {
            if (entry[u].rank < 0) continue;
            float v[4] = {}, wide[4];
            auto plus = [&](const float* from) {
                const float4 four = *reinterpret_cast<const float4*>(from + at[u]);
                v[0] += four.x, v[1] += four.y, v[2] += four.z, v[3] += four.w;
            };
            for (u32 r = 0; r < cta.size; r++) plus(cta.sums + r * ROWS * args.stride);
            if (entry[u].c) {
                widen(wide, c[u]);
                for (int q = 0; q < 4; q++) v[q] *= wide[q];
            }
            if (entry[u].rank > 0) plus(cta.added);
            for (uint2 more : {bias[u], base_bias[u], y[u]}) {
                widen(wide, more);
                for (int q = 0; q < 4; q++) v[q] += wide[q];
            }
            *reinterpret_cast<uint2*>(args.y + to[u]) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
        }
    }
}
