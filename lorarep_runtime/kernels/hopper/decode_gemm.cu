// The product of a few rows with a weight of 4, 8 or 16 bits (KIND), and what the adapters of those rows add to it.
//
// y[m, n] = c[m, n] * sum_k W[n, k] x[m, k] + sum_j B[m, n, j] low[m, j] + b[m, n], with c, B and b of row m's adapter.
//
// W is the A operand, x the B operand: of mma.m16n8k16 for few rows of x, of wgmma.m64nNk16, which four warps give together,
// for more (WGMMA). A tile is 16 rows of W, a chunk 64 of its columns. Lane (g, t) of a warp holds 16 numbers of each of the
// rows g and g + 8, loaded 16 bytes at a time (PLANES of them), as A wants them.
//
// NF4: a chunk is one block of constants and lies as the lanes hold it, as int8's does. A byte is two weights and becomes one
// register, two bf16 numbers, through a table that each lane has its own copy of in its own bank of shared memory. A chunk is
// summed before it is scaled, so the scales cost a multiplication for each sum and chunk.
// int8: a scale for each row. bf16 holds every int8 exactly.
// bf16: rows as torch has them. A lane has 16 neighbouring columns, so x is permuted to match.
//
// The CTAs of a cluster share tiles and split the columns; in a round each of WARPS warps takes TILES of them, and the CTAs
// add up their sums through distributed shared memory, in the same order every time. In the next round x is still there.
// What adapters add waits for none of that: SIDE warps compute it meanwhile. They also finish every round but the last, whose
// sums the others leave behind; there all warps help.

#include "decode_gemm_adapters.cuh"
#include "decode_gemm_group.cuh"
#include "decode_gemm_outputs.cuh"
#include "decode_gemm_tensor_cores.cuh"
#include "decode_gemm_x.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ Group G) {
    extern __shared__ __align__(128) unsigned char shared[];
    const u32 rank = cluster_rank(), size = cluster_size();
    const int warp = own_warp(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_tile = blockIdx.x / size * G.cluster_tiles, end_tile = min(first_tile + G.cluster_tiles, G.tiles);

    const u32 base = u32(__cvta_generic_to_shared(shared));
    // The sums that the cluster's CTAs leave here, (CTAs, rows, stride), and what is added to them, (rows, stride).
    float* sums_in = reinterpret_cast<float*>(shared + G.sums_at);
    float* added = reinterpret_cast<float*>(shared + G.added_at);
    // Barriers: sums are here; those of all CTAs have been read; A x of the last tasks is here.
    const u32 full = base + G.entries_at, empty = full + 8, ready = full + 16;
    Entry* entries = reinterpret_cast<Entry*>(shared + G.entries_at + BARRIER_BYTES);
    const int first_module = Output(G, first_tile * 16).module, last_module = Output(G, end_tile * 16 - 1).module;
    Adapters adapters{G, entries, reinterpret_cast<u16*>(entries + G.rows * G.modules),
                      reinterpret_cast<int*>(shared + G.entries_at + 24), first_module, last_module - first_module + 1};
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(full), "r"(WARPS * size) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(empty), "r"(size) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(ready), "r"(SIDE * 32) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");

    if (warp >= WARPS) {
        adapters.read_entries(entries);
        sync<2, SIDE * 32>();
        int tile = first_tile;
        for (int i = 0; i < G.rounds; i++) {
            const Round round(G, tile, end_tile, G.rounds - i, size);
            const int first_output = round.tile * 16 + rank * round.share;
            const int outputs = min(round.share, round.tiles * 16 - int(rank) * round.share);
            if (i == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
            for (int from = 0; from < G.ranks; from += adapters.segment) {
                if (from > 0 || i > 0) sync<2, SIDE * 32>();
                if (adapters.thread == 0) *adapters.taken = 0;
                if (i == 0 || G.ranks > adapters.segment) adapters.sum_low(from);
                sync<2, SIDE * 32>();
                if (i + 1 == G.rounds && from + adapters.segment >= G.ranks) arrive(ready, rank);
                adapters.add(from, added, first_output, outputs);
            }
            if (i == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
            if (i == 0 && G.in_place) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
            if (i + 1 == G.rounds) break;
            write_outputs<2, SIDE * 32>(G, round, sums_in, added, entries, full, i & 1, rank, size, adapters.thread);
            sync<2, SIDE * 32>();
            if (adapters.thread < size) arrive(empty, adapters.thread);
            tile += round.tiles;
        }
    } else {
        const int all_chunks = G.columns / CHUNK;
        const int begin = all_chunks * rank / size, chunks = all_chunks * (rank + 1) / size - begin;
        const u64 policy = read_once();
        const i64 row = G.columns / 8;  // of the weight, in 16 bytes, where it lies in rows
        const uint4* w[TILES];
        const float* s[TILES];
        uint4 bytes[DEPTH][TILES][PLANES];
        float2 scale[DEPTH][TILES];
        auto load = [&](int d, int ahead, bool wanted) {
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
        };
        // Each lane's part of what of chunk after chunk is fetched to the L2 cache: in cache lines.
        const char* line;
        u32 line_step;
        auto prefetch = [&](int d, bool wanted) {
            if (KIND == 4)  // of more bits so many chunks would fill the cache
                asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p prefetch.global.L2 [%0]; }"
                             :: "l"(line + d * line_step), "r"(u32(wanted)));
        };
        auto start = [&](const Round& round) {
            const i64 tile = min(round.tile + warp * TILES + lane / 8 % TILES, G.tiles - 1);
            const bool scales = lane % 8 == 4;
            const i64 at = tile * all_chunks + begin;
            line = scales ? reinterpret_cast<const char*>(G.scales + at * 16)
                          : reinterpret_cast<const char*>(G.weights + at * 32) + lane % 4 * 128;
            line_step = scales ? 64 : 512;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const i64 at = min(round.tile + warp * TILES + i, G.tiles - 1);
                w[i] = KIND == 16 ? G.weights + (at * 16 + g) * row + begin * STEP + t
                                  : G.weights + (at * all_chunks + begin) * STEP + lane;
                s[i] = G.scales + (KIND == 4 ? (at * all_chunks + begin) * 16 + 2 * g : at * 16 + g);
            }
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
        };
        // Weights do not depend on what came before: the first ones are on their way while it ends.
        Round round(G, first_tile, end_tile, G.rounds, size);
        int left = start(round);
        asm volatile("griddepcontrol.launch_dependents;");
#if KIND == 4
        if (base + G.table_at & 0x7fff) __trap();  // these bits are an index
        u32* table = reinterpret_cast<u32*>(shared + G.table_at);
        for (int first = warp * 32; first < 256; first += WARPS * 32) {
            const u32 own = pack_bf16(NF4[first + lane >> 4], NF4[lane & 15]);
            for (int i = 0; i < 32; i++) table[(first + i) * 32 + lane] = __shfl_sync(~0u, own, i);
        }
#endif
        const u32 x = base + G.x_at;
        asm volatile("griddepcontrol.wait;" ::: "memory");
        stage_x(G, x, begin, chunks);

#if KIND == 4
        u32 place = base + G.table_at + lane * 4;
        asm volatile("" : "+r"(place) :: "memory");  // no lookup before the table is here
#elif KIND == 8
        // A number that the compiler does not see, or it makes the selectors of permutations anew each time: only one of their
        // operands may be a constant.
        const u32 exponents = 0x43434343 + (G.rows >> 16);
#endif
        // A's eight registers for 16 rows and half a chunk.
        auto fragments = [&](u32 (&a)[8], const uint4 (&v)[PLANES], int half) {
#if KIND == 4
            const u32 g0 = half ? v[0].y : v[0].x, g8 = half ? v[0].w : v[0].z;
            a[0] = lookup<0>(place, g0), a[1] = lookup<0>(place, g8), a[2] = lookup<1>(place, g0), a[3] = lookup<1>(place, g8);
            a[4] = lookup<2>(place, g0), a[5] = lookup<2>(place, g8), a[6] = lookup<3>(place, g0), a[7] = lookup<3>(place, g8);
#elif KIND == 8
            const u32 g0 = half ? v[0].z : v[0].x, g8 = half ? v[1].z : v[1].x;
            const u32 h0 = half ? v[0].w : v[0].y, h8 = half ? v[1].w : v[1].y;
            a[0] = signed_pair<0>(g0, exponents), a[1] = signed_pair<0>(g8, exponents);
            a[2] = signed_pair<2>(g0, exponents), a[3] = signed_pair<2>(g8, exponents);
            a[4] = signed_pair<0>(h0, exponents), a[5] = signed_pair<0>(h8, exponents);
            a[6] = signed_pair<2>(h0, exponents), a[7] = signed_pair<2>(h8, exponents);
#else
            const uint4 g0 = v[half], g8 = v[2 + half];
            a[0] = g0.x, a[1] = g8.x, a[2] = g0.y, a[3] = g8.y, a[4] = g0.z, a[5] = g8.z, a[6] = g0.w, a[7] = g8.w;
#endif
        };
        float sums[TILES][EIGHTS][4];
        auto add_scaled = [&](int d, const float (&parts)[TILES][EIGHTS][4]) {
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int e = 0; e < EIGHTS; e++) {
                    sums[i][e][0] += scale[d][i].x * parts[i][e][0];
                    sums[i][e][1] += scale[d][i].x * parts[i][e][1];
                    sums[i][e][2] += scale[d][i].y * parts[i][e][2];
                    sums[i][e][3] += scale[d][i].y * parts[i][e][3];
                }
        };
        auto advance = [&] {
#pragma unroll
            for (int i = 0; i < TILES; i++) w[i] += DEPTH * STEP, s[i] += DEPTH * 16;
            line += DEPTH * line_step;
        };
        for (int index = 0;; index++) {
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int e = 0; e < EIGHTS; e++)
                    for (int q = 0; q < 4; q++) sums[i][e][q] = 0;
#if WGMMA
            // Half a chunk is multiplied while the next one's A is made. A chunk is finished, scaled and its registers loaded
            // anew, while the next one begins. All of DEPTH chunks are finished at the end: what is on its way there, the compiler
            // would have wait each time.
            static_assert(TILES == 1 && DEPTH % 2 == 0, "");
            u32 x_at = 1u << 16 | (x & 0x3ffff) >> 4;
            float parts[2][TILES][EIGHTS][4] = {};
            constexpr int STEPS = KIND == 4 && EIGHTS == 4 ? 1 : 2;  // of 16 columns, multiplied together: registers are few
            u32 a[2][STEPS * 4];
            auto multiply = [&](int d, int half) {
#pragma unroll
                for (int first = 0; first < 2; first += STEPS) {
                    auto& own = a[STEPS == 1 ? first : half];
                    u32 all[8];
                    fragments(all, bytes[d][0], half);
                    for (int q = 0; q < STEPS * 4; q++) own[q] = all[first * 4 + q];
                    begin_wgmma();
#pragma unroll
                    for (int k = 0; k < STEPS; k++)
                        wgmma(KIND == 4 ? parts[d % 2][0] : sums[0], own + k * 4,
                              x_at + d * ROWS * 8 + half * 4 + (first + k) * 2, KIND != 4 || half + first + k > 0);
                    commit_wgmma();
                    await_wgmma<1>();
                }
            };
            auto finish = [&](int d) {
                if (KIND == 4) pin(parts[d % 2][0]), add_scaled(d, parts[d % 2]);
            };
            for (; left >= DEPTH; left -= DEPTH) {
#pragma unroll
                for (int d = 0; d < DEPTH; d++) {
                    prefetch(d, d + FETCH < left);
                    multiply(d, 0);
                    if (d > 0) finish(d - 1), load(d - 1, DEPTH, d - 1 + DEPTH < left);
                    multiply(d, 1);
                }
                await_wgmma<0>();
                finish(DEPTH - 1), load(DEPTH - 1, DEPTH, DEPTH - 1 + DEPTH < left);
                x_at += DEPTH * ROWS * 8;
                advance();
            }
#pragma unroll
            for (int d = 0; d < DEPTH; d++)
                if (d < left) {
                    multiply(d, 0), multiply(d, 1);
                    await_wgmma<0>();
                    finish(d);
                }
            if (KIND != 4) pin(sums[0]);
#else
            u32 x_at = x + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
            auto compute = [&](int d) {
                float parts[TILES][EIGHTS][4] = {};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 b[EIGHTS][4];
#pragma unroll
                    for (int e = 0; e < EIGHTS; e++) load_matrices(b[e], (x_at ^ half * 64) + d * ROWS * 128 + e * 1024);
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        u32 a[8];
                        fragments(a, bytes[d][i], half);
#pragma unroll
                        for (int e = 0; e < EIGHTS; e++) {
                            auto& to = KIND == 4 ? parts[i][e] : sums[i][e];
                            mma(to, a[0], a[1], a[2], a[3], b[e][0], b[e][1]);
                            mma(to, a[4], a[5], a[6], a[7], b[e][2], b[e][3]);
                        }
                    }
                }
                if (KIND == 4) add_scaled(d, parts);
            };
            for (; left >= DEPTH; left -= DEPTH) {
#pragma unroll
                for (int d = 0; d < DEPTH; d++) {
                    prefetch(d, d + FETCH < left);
                    compute(d);
                    load(d, DEPTH, d + DEPTH < left);
                }
                x_at += DEPTH * ROWS * 128;
                advance();
            }
#pragma unroll
            for (int d = 0; d < DEPTH; d++)
                if (d < left) compute(d);
#endif
#if KIND == 8
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int e = 0; e < EIGHTS; e++) {
                    sums[i][e][0] *= scale[0][i].x, sums[i][e][1] *= scale[0][i].x;
                    sums[i][e][2] *= scale[0][i].y, sums[i][e][3] *= scale[0][i].y;
                }
#endif
            // The next round's first weights are on their way while this one's sums are.
            const Round done = round;
            const bool more = index + 1 < G.rounds;
            if (more) {
                round = Round(G, done.tile + done.tiles, end_tile, G.rounds - index - 1, size);
                left = start(round);
            }
            if (index == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all have begun
            else await(empty, index - 1 & 1);
            if (G.in_place) {  // all are done with x
                asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
                asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
            }
            send(G, done, u32(__cvta_generic_to_shared(sums_in)), full, sums, rank, size);
            if (!more) break;
        }
    }

    int last = first_tile;
    for (int i = 0; i + 1 < G.rounds; i++) last += Round(G, last, end_tile, G.rounds - i, size).tiles;
    const Round round(G, last, end_tile, 1, size);
    if (warp < WARPS) {
        await(ready, 0);
        adapters.add((G.ranks - 1) / adapters.segment * adapters.segment, added, round.tile * 16 + rank * round.share,
                     min(round.share, round.tiles * 16 - int(rank) * round.share));
    }
    write_outputs<0, THREADS>(G, round, sums_in, added, entries, full, G.rounds - 1 & 1, rank, size, threadIdx.x);
}
