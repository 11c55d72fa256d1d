// The adapters' part of a decode GEMM: B shrunk, for each row with the B of its own adapter.
#pragma once

#include "decode_gemm_cta.cuh"

struct Piece {    // a lane's operands of B shrunk for 16 ranks and 64 outputs of a row
    u32 b[4][4];  // bf16 numbers of B: ranks 2t, 2t + 1, 2t + 8, 2t + 9 of the outputs 8g to 8g + 7
    u32 shrunk;   // address of the lane's shrunk in shared memory; 0 behind the last piece
    u32 to;       // address of the lane's outputs, odd if it writes none; 0 while more pieces of the row follow
};

// Computes B shrunk for the CTA's outputs. The SIDE warps do so; the other warps help once they have multiplied.
struct Adapters {
    const GemmArguments& args;
    const int first_module, last_module;  // the modules whose outputs the cluster has
    const Entry* entries;
    u16* shrunk;  // (rows, modules, 2, ranks of a block) bf16
    int* taken;   // number of tasks that have been taken
    int modules;
    int rank_block = args.shrunk_ranks / modules / 16 * 16;  // ranks of a module in `shrunk` at a time
    int thread = threadIdx.x - WARPS * 32, lane = threadIdx.x % 32;

    __device__ __forceinline__ Adapters(const GemmArguments& args, const Cta& cta)
        : args(args), first_module(Output(args, cta.first_tile * TILE).module),
          last_module(Output(args, cta.end_tile * TILE - 1).module), entries(cta.entries),
          shrunk(reinterpret_cast<u16*>(cta.entries + args.rows * args.modules)), taken(cta.taken),
          modules(last_module - first_module + 1) {}

    // Copies the entry of each row and module from its adapter's table to shared memory.
    __device__ void read_entries(Entry* to) {
        for (int i = thread; i < args.rows * args.modules; i += SIDE * 32) {
            const int position = args.positions[i / args.modules];
            Entry entry = {0, 0, 0, position < 0 ? -1 : 0};
            const i64 table = args.adapters[i / args.modules];
            if (position >= 0 && table) {
                const i64* e = reinterpret_cast<const i64*>(table);
                e += (i64(position) * args.all_modules + args.first + i % args.modules) * ENTRY_FIELDS;
                entry = {reinterpret_cast<const u16*>(e[1]), reinterpret_cast<const u16*>(e[2]),
                         reinterpret_cast<const u16*>(e[3]), int(e[4])};
            }
            to[i] = entry;
        }
    }

    // The most ranks that row `lane` has in any module; -1 if the row passes through.
    __device__ int ranks_of_row() {
        int ranks = -1;
        for (int i = 0; lane < args.rows && i < modules; i++) ranks = max(ranks, entries[lane * args.modules + first_module + i].rank);
        return ranks;
    }

    // Adds up the parts of shrunk for rank_block ranks, from `from` on, and stores them in shared memory. Each number becomes
    // the sum of two bf16 numbers; the first ones of all ranks precede the second ones. Zeros fill up to a multiple of 16.
    __device__ void stage_shrunk(int from) {
        const int most = min(__reduce_max_sync(~0u, ranks_of_row()) - from, rank_block);
        const int fours = (most + 15) / 16 * 4, all = args.rows * modules * fours;
        const i64 stride = args.modules * args.ranks;
        for (int i = thread; i < all; i += 2 * SIDE * 32) {  // two at a time, since each waits for memory
            const float* part[2];
            int to[2], left[2];
            float sum[2][4] = {};
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const int at = min(i + u * SIDE * 32, all - 1), j = at % fours * 4, which = at / fours;  // (row, module)
                const int m = which / modules, module = first_module + which % modules;
                left[u] = entries[m * args.modules + module].rank - from - j;
                part[u] = args.shrunk + m * args.parts * stride + module * args.ranks + from + j;
                to[u] = which * rank_block * 2 + j;
            }
#pragma unroll 4
            for (int p = 0; p < args.parts; p++)
#pragma unroll
                for (int u = 0; u < 2; u++)
                    if (left[u] > 0) {
                        const float4 v = *reinterpret_cast<const float4*>(part[u] + p * stride);
                        sum[u][0] += v.x, sum[u][1] += v.y, sum[u][2] += v.z, sum[u][3] += v.w;
                    }
#pragma unroll
            for (int u = 0; u < 2; u++) {
                for (int q = 0; q < 4; q++) sum[u][q] = q < left[u] ? sum[u][q] : 0;
                float high[4];
                const uint2 bits = make_uint2(pack_bf16(sum[u][0], sum[u][1]), pack_bf16(sum[u][2], sum[u][3]));
                widen(high, bits);
                for (int q = 0; q < 4; q++) sum[u][q] -= high[q];
                *reinterpret_cast<uint2*>(shrunk + to[u]) = bits;
                *reinterpret_cast<uint2*>(shrunk + to[u] + rank_block) =
                    make_uint2(pack_bf16(sum[u][0], sum[u][1]), pack_bf16(sum[u][2], sum[u][3]));
            }
        }
    }

    // Writes B shrunk of rank_block ranks, from `from` on, to `added`; adds it there if `from` is not 0.
    // A task is 64 outputs of a row.
    //
    // B is tensor cores' A operand, (16 outputs, 16 ranks) four times. The columns of the B operand are the two halves of
    // shrunk, module after module. So lane t has the sums with module t's shrunk. The lane of an output's own module writes.
    __device__ void add(int from, float* added, int first_output, int outputs) {
        const int row_ranks = ranks_of_row(), g = lane / 4, t = lane % 4;
        const bool any = outputs > 0 && __reduce_max_sync(~0u, row_ranks) > from;
        const int groups = (outputs + 63) / 64, tasks = any ? groups * args.rows : 0;
        const float by_groups = __fdividef(1, groups);
        const u32 added_at = u32(__cvta_generic_to_shared(added)), shrunk_begin = u32(__cvta_generic_to_shared(shrunk));
        int ranks = 0;  // ranks of the row that are still to come
        int at = 0, last = 0, out = 0;  // the lane's first rank of the piece, and the last one of its module
        u32 shrunk_at = 0, to = 1;
        const u16* B = 0;
        float4 sums[2];  // of the row's pieces so far, for 64 outputs
        auto next = [&] {
            for (;;) {
                int task = 0;
                if (lane == 0) task = atomicAdd(taken, 1);
                task = __shfl_sync(~0u, task, 0);
                if (task >= tasks) return false;
                const int row = (task + 0.5f) * by_groups, local = (task - row * groups) * 64 + g * 8;
                ranks = min(__shfl_sync(~0u, row_ranks, row) - from, rank_block);
                if (ranks <= 0) continue;
                const bool inside = local < outputs;
                const Output of(args, first_output + (inside ? local : 0));
                const Entry& entry = entries[row * args.modules + of.module];
                const bool there = entry.rank > from;
                to = inside && there && t == of.module - first_module ? added_at + (row * args.stride + local) * 4 : 1;
                at = from + 2 * t, last = there ? min(entry.rank, from + rank_block) - 1 : 0;
                B = there ? entry.B + of.inner : reinterpret_cast<const u16*>(args.weights), out = there ? of.out : 0;
                const float4* before = reinterpret_cast<const float4*>(__cvta_shared_to_generic(to));
#pragma unroll
                for (int half = 0; half < 2; half++) sums[half] = from > 0 && !(to & 1) ? before[half] : make_float4(0, 0, 0, 0);
                shrunk_at = shrunk_begin + (((row * modules + min(g / 2, modules - 1)) * 2 + g % 2) * rank_block + 2 * t) * 2;
                return true;
            }
        };
        auto fetch = [&](Piece& P) {
            P.shrunk = 0;
            if (ranks <= 0 && !next()) return;
#pragma unroll
            for (int i = 0; i < 4; i++)  // numbers behind the last rank are multiplied by 0
                load_past_L1(P.b[i], B + i64(min(at + i % 2 + i / 2 * 8, last)) * out);
            P.shrunk = shrunk_at;
            ranks -= 16, at += 16, shrunk_at += 32;
            P.to = ranks <= 0 ? to : 0;
        };
        // A piece is summed on its own: sums do not depend on how many ranks are in shared memory at a time.
        auto use = [&](const Piece& P) {
            u32 shrunk0, shrunk8;
            load_shared(shrunk0, shrunk8, P.shrunk);
            float v[4][4] = {};
#pragma unroll
            for (int q = 0; q < 4; q++)
                mma(v[q], __byte_perm(P.b[0][q], P.b[1][q], 0x5410), __byte_perm(P.b[0][q], P.b[1][q], 0x7632),
                    __byte_perm(P.b[2][q], P.b[3][q], 0x5410), __byte_perm(P.b[2][q], P.b[3][q], 0x7632), shrunk0, shrunk8);
            float4* to = reinterpret_cast<float4*>(__cvta_shared_to_generic(P.to));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const auto& even = v[half * 2];
                const auto& odd = v[half * 2 + 1];
                float4& sum = sums[half];
                sum.x += even[0] + even[1], sum.y += even[2] + even[3], sum.z += odd[0] + odd[1], sum.w += odd[2] + odd[3];
                if (P.to && !(P.to & 1)) to[half] = sum;
            }
        };
        for (Piece piece; fetch(piece), piece.shrunk; ) use(piece);
    }
};
