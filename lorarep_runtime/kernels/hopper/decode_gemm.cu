// A decode GEMM: few rows of x times a weight of 4, 8 or 16 bits (KIND), with the adapters of those rows.
//
// y[m, n] = c[m, n] * sum_k W[n, k] x[m, k] + sum_j B[m, n, j] shrunk[m, j] + b[m, n], with c, B and b of row m's adapter.
//
// Words: a row is one of x, an output one of W's rows. A tile is 16 outputs, a chunk 64 columns. A part is a share of x's
// columns that shrunk = A x is split into; shrunk is the sum of its parts. A round is the tiles that a cluster takes at once.
//
// W is the A operand, x the B operand. Few rows take mma.m16n8k16 of a warp (decode_gemm_mma.cuh). More rows take
// wgmma.m64nNk16 of four warps (WGMMA, decode_gemm_wgmma.cuh). Lane (g, t) of a warp holds 16 numbers of each of the outputs
// g and g + 8, loaded 16 bytes at a time (PLANES of them), in the order of the A operand.
//
// NF4: a chunk is one block of scales and lies in the order of the lanes, as int8's does. A byte is two weights and becomes
// one register, two bf16 numbers, through a table in shared memory. A chunk is summed before it is scaled, so the scales cost
// a multiplication for each sum and chunk.
// int8: each output has a scale. bf16 holds every int8 exactly.
// bf16: torch's row-major order. A lane has 16 neighbouring columns, so x is permuted to match.
//
// The CTAs of a cluster share tiles and split the columns. In a round each of WARPS warps takes TILES tiles, and the CTAs
// add up their sums through distributed shared memory, in the same order every time. x stays for the next round.
// SIDE warps compute the adapters' part concurrently. They also finish every round but the last; all warps finish that one.

#include "decode_gemm_adapters.cuh"
#include "decode_gemm_outputs.cuh"
#include "decode_gemm_x.cuh"
#if WGMMA
#include "decode_gemm_wgmma.cuh"
#else
#include "decode_gemm_mma.cuh"
#endif

// The branches below are one function. As functions of their own, the compiler schedules their instructions otherwise.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_gemm(const __grid_constant__ GemmArguments args) {
    extern __shared__ __align__(128) unsigned char shared[];
    const Cta cta(args, shared);
    const int warp = cta.warp, lane = cta.lane, g = lane / 4, t = lane % 4;
    Adapters adapters(args, cta);
    cta.init_barriers();

    if (warp >= WARPS) {
        // The side warps: the adapters' part of every round, and y of every round but the last.
        adapters.read_entries(cta.entries);
        sync<SIDE_WARPS>();
        int tile = cta.first_tile;
        for (int i = 0; i < args.rounds; i++) {
            const Round round(args, tile, cta.end_tile, args.rounds - i, cta.size);
            const int first_output = round.first_output(cta.rank), outputs = round.outputs(cta.rank);
            if (i == 0) await_previous_kernel();
            for (int from = 0; from < args.ranks; from += adapters.rank_block) {
                if (from > 0 || i > 0) sync<SIDE_WARPS>();
                if (adapters.thread == 0) *adapters.taken = 0;
                if (i == 0 || args.ranks > adapters.rank_block) adapters.stage_shrunk(from);
                sync<SIDE_WARPS>();
                if (i + 1 == args.rounds && from + adapters.rank_block >= args.ranks) arrive(cta.ready, cta.rank);
                adapters.add(from, cta.added, first_output, outputs);
            }
            if (i == 0) cluster_wait();
            if (i == 0 && args.in_place) cluster_arrive();
            if (i + 1 == args.rounds) break;
            write_outputs<SIDE_WARPS>(args, cta, round, i & 1, adapters.thread);
            sync<SIDE_WARPS>();
            if (adapters.thread < cta.size) arrive(cta.empty, adapters.thread);
            tile += round.tiles;
        }
    } else {
        // The other warps: the sums of every round, sent to the CTAs that finish their outputs.
        // 1. The first weights do not depend on the previous kernel: they load while it ends.
        const int all_chunks = args.columns / CHUNK;
        const int begin = all_chunks * cta.rank / cta.size, chunks = all_chunks * (cta.rank + 1) / cta.size - begin;
        const u64 policy = evict_first_policy();
        const i64 row = args.columns / 8;
        const uint4* w[TILES];
        const float* s[TILES];
        uint4 bytes[DEPTH][TILES][PLANES];
        float2 scale[DEPTH][TILES];
        WeightStream weights{args, warp, lane, g, t, all_chunks, begin, chunks, policy, row, w, s, bytes, scale};
        Round round(args, cta.first_tile, cta.end_tile, args.rounds, cta.size);
        int left = weights.start(round);
        launch_dependents();
        if (KIND == 4) fill_table(args, cta, shared);
        // 2. x is the previous kernel's output.
        const u32 x = cta.base + args.x_at;
        await_previous_kernel();
        stage_x(args, x, begin, chunks);
        const Fragments fragments(args, cta);
        Sums sums;
        for (int index = 0;; index++) {
            // 3. The warps multiply the round's tiles.
            clear(sums);
            multiply(weights, fragments, sums, x, left);
            if (KIND == 8) scale_rows(sums, scale[0]);
            // 4. The next round's first weights load while this one's sums are sent.
            const Round done = round;
            const bool more = index + 1 < args.rounds;
            if (more) {
                round = Round(args, done.tile + done.tiles, cta.end_tile, args.rounds - index - 1, cta.size);
                left = weights.start(round);
            }
            // 5. The other CTAs must have begun, or have read the sums of the round before.
            if (index == 0) cluster_wait();
            else await(cta.empty, index - 1 & 1);
            // 6. Sums may replace x only once all CTAs have multiplied.
            if (args.in_place) {
                cluster_arrive();
                cluster_wait();
            }
            send(args, cta, done, sums);
            if (!more) break;
        }
    }

    // All warps finish the last round. Those that multiplied take tasks of the adapters' part first.
    int last = cta.first_tile;
    for (int i = 0; i + 1 < args.rounds; i++) last += Round(args, last, cta.end_tile, args.rounds - i, cta.size).tiles;
    const Round round(args, last, cta.end_tile, 1, cta.size);
    if (warp < WARPS) {
        await(cta.ready, 0);
        adapters.add((args.ranks - 1) / adapters.rank_block * adapters.rank_block, cta.added, round.first_output(cta.rank),
                     round.outputs(cta.rank));
    }
    write_outputs<ALL_WARPS>(args, cta, round, args.rounds - 1 & 1, threadIdx.x);
}
