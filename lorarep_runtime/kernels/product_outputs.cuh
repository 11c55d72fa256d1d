#pragma once

#include "product_group.cuh"

// The lanes' part of the sums of a round's tiles: `sums` of tile i go to where their outputs are finished.
__device__ __forceinline__ void send(
    const Group& G, const Round& round, u32 sums_at, u32 full, const float (&sums)[TILES][EIGHTS][4], u32 rank, u32 size
) {
    const int warp = own_warp(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int n = (warp * TILES + i) * 16 + g + half * 8, owner = n / round.share;
            if (n >= round.tiles * 16) continue;
            const u32 to = sums_at + (rank * ROWS * G.stride + n % round.share) * 4;
#pragma unroll
            for (int e = 0; e < EIGHTS; e++)
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    const int m = e * 8 + 2 * t + q;
                    if (m < G.rows) store_cluster(to + m * G.stride * 4, owner, sums[i][e][half * 2 + q]);
                }
        }
    __syncwarp();
    if (lane < size) arrive(full, lane);
}

// y of the CTA's outputs by some warps, a lane four of a row at a time: what adapters add is there, sums when `full` says so.
__device__ __forceinline__ void write_outputs(
    const Group& G, const Round& round, const float* sums, const float* added, const Entry* entries, u32 full, u32 parity,
    u32 rank, u32 size, int warp, int warps
) {
    const int first = round.tile * 16 + rank * round.share, lane = threadIdx.x % 32;
    const int fours = (min(round.share, round.tiles * 16 - int(rank) * round.share) + 3) / 4;
    int bits = 5;  // of the lanes that share a row
    while (bits > 0 && 1 << (bits - 1) >= fours) bits--;
    const int others = 32 >> bits, step = warps * others;
    bool there = false;
    for (int four = lane & (1 << bits) - 1; four < fours; four += 1 << bits) {
        const int local = four * 4, n = first + local;
        const Output of(G, n);
        uint2 base_bias = make_uint2(0, 0);
        if (G.base_bias) base_bias = load4(G.base_bias + n);
        for (int m = warp * others + (lane >> bits); m < G.rows; m += 2 * step) {
            uint2 c[2], bias[2], y[2];
            Entry entry[2];
#pragma unroll
            for (int u = 0; u < 2; u++) {  // two at a time: each waits for memory
                entry[u] = entries[min(m + u * step, G.rows - 1) * G.modules + of.module];
                bias[u] = y[u] = make_uint2(0, 0);
                if (entry[u].c) c[u] = load4(entry[u].c + of.inner);
                if (entry[u].bias) bias[u] = load4(entry[u].bias + of.inner);
                if (G.add) y[u] = load4(G.y + i64(min(m + u * step, G.rows - 1)) * (G.tiles * 16) + n);
            }
            if (!there) await(full, parity);
            there = true;
#pragma unroll
            for (int u = 0; u < 2; u++) {
                if (m + u * step >= G.rows || entry[u].rank < 0) continue;
                const int at = (m + u * step) * G.stride + local;
                float v[4] = {}, wide[4];
                auto plus = [&](const float* from) {
                    const float4 four = *reinterpret_cast<const float4*>(from + at);
                    v[0] += four.x, v[1] += four.y, v[2] += four.z, v[3] += four.w;
                };
                for (u32 r = 0; r < size; r++) plus(sums + r * ROWS * G.stride);
                if (entry[u].c) {
                    widen(wide, c[u]);
                    for (int q = 0; q < 4; q++) v[q] *= wide[q];
                }
                if (entry[u].rank > 0) plus(added);
                for (uint2 more : {bias[u], base_bias, y[u]}) {
                    widen(wide, more);
                    for (int q = 0; q < 4; q++) v[q] += wide[q];
                }
                *reinterpret_cast<uint2*>(G.y + i64(m + u * step) * (G.tiles * 16) + n) =
                    make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
            }
        }
    }
    if (!there) await(full, parity);
}
