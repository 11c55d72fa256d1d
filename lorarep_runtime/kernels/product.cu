// The product of a few rows with a weight of 4, 8 or 16 bits (KIND), and the adapters of those rows in its epilogue.
//
// y[m, n] = c[m, n] * sum_k W[n, k] x[m, k] + sum_j B[m, n, j] low[m, j] + b[m, n], with c, B and b of row m's adapter.
//
// W is the A operand, x the B operand: of mma.m16n8k16 for few rows of x, of wgmma.m64nNk16, which four warps give together,
// for more (WGMMA). A tile is 16 rows of W, a chunk 64 of its columns. Lane (g, t) of a warp holds 16 numbers of each of the
// rows g and g + 8, loaded 16 bytes at a time (PLANES of them), as A wants them.
//
// NF4: a chunk is one block of constants and lies as the lanes hold it. A byte is two weights and becomes one register, two
// bf16 numbers, through a table that each lane has its own copy of in its own bank of shared memory. A chunk is summed before
// it is scaled, so the scales cost a multiplication for each sum and chunk.
// int8: rows as bitsandbytes has them, a scale for each. bf16 holds every int8 exactly.
// bf16: rows as torch has them. Of these two a lane has 16 neighbouring columns, so x is permuted to match.
//
// The CTAs of a cluster share tiles and split the columns; in a round each of WARPS warps takes TILES of them, and the CTAs
// add up their sums through distributed shared memory, in the same order every time. In the next round x is still there.
// What adapters add waits for none of that: SIDE warps compute it meanwhile. They also finish every round but the last, whose
// sums the others leave behind; there all warps help. Registers go from these warps to those.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

#define ENTRY 5
#define CHUNK 64
#define ROWS (EIGHTS * 8)
#define SIDE 4  // a warpgroup, as setmaxnreg wants it
#define THREADS (32 * (WARPS + SIDE))
#define SIDE_REGISTERS 96
#define REGISTERS ((65536 / THREADS / 8 * 8 * (WARPS + SIDE) - SIDE_REGISTERS * SIDE) / WARPS / 8 * 8)
#define UNIT (WGMMA ? 4 : TILES)  // tiles that are multiplied or not
#define FETCH 8                   // chunks of weights on their way from memory to the L2 cache; from there it is DEPTH
#define AHEAD 1                   // pieces of B that a lane has on their way besides the one it works on
#if KIND == 4
#define PLANES 1
#define STEP 32  // from one chunk to the next, in 16 bytes
#else
#define PLANES (KIND / 4)
#define STEP (KIND / 2)
#endif

struct Group {                // modules that read the same x, their weights one under the other
    const uint4* weights;     // NF4: (tiles, chunks, 32), else (outputs, columns)
    const float* scales;      // NF4: (tiles, chunks, 8, 2), rows g and g + 8; int8: (outputs), the largest of each row
    const u16* x;             // (rows, columns) bf16
    u16* y;                   // (rows, outputs) bf16
    const u16* base_bias;     // (outputs) bf16, or null
    const float* low;         // (rows, parts, modules, ranks): partial sums of A x
    const int* positions;     // (rows), -1 where a row passes through
    const i64* adapters;      // (rows) addresses of entry tables (positions, all modules, 5), or 0
    int rows, columns, tiles;
    int parts, ranks;         // of low
    int first, modules;       // first module's number in the entry tables; how many modules
    int all_modules;          // of an entry table
    int ends[3];              // outputs of the group up to and with each module
    int add;                  // whether y is added to (a residual) rather than written
    int cluster_tiles, rounds;  // that a cluster takes so many tiles in
    int rank_segment;           // ranks of low in shared memory at a time
    int stride;                 // of a row of sums; four times an odd number, so that a warp's sums are in different banks
    int table_at, x_at, sums_at, added_at, entries_at;  // in shared memory, bytes
    int in_place;               // whether sums are where x was
};

struct Entry {  // of one row's adapter for one module; a rank of -1 is a row that passes through
    const u16 *B, *c, *bias;
    int rank, unused;
};

struct Piece {  // of what an adapter adds: 16 ranks, 64 outputs of a row
    u32 b[4][4];  // bf16, of ranks 2t, 2t + 1, 2t + 8, 2t + 9 the outputs 8g to 8g + 7
    u32 low;      // where the lane's A x is in shared memory; 0 after the last piece
    u32 to;       // where the lane's outputs are, odd for nowhere; 0 while more pieces of the row follow
};

struct Round {  // of a cluster
    int tile, tiles;  // the first, how many
    int share;        // outputs that each CTA finishes, at most; a multiple of eight
    __device__ Round(const Group& G, int tile, int end, int left, int size) : tile(tile) {
        tiles = min((end - tile + left * UNIT - 1) / (left * UNIT) * UNIT, end - tile);
        share = (tiles * 16 + size * 8 - 1) / (size * 8) * 8;
    }
};

struct Output {  // which module an output of the group belongs to, its place there, and the module's outputs
    int module, inner, out;
    __device__ Output(const Group& G, int n) {
        module = (n >= G.ends[0]) + (n >= G.ends[1]);
        const int start = module == 0 ? 0 : module == 1 ? G.ends[0] : G.ends[1];
        inner = n - start;
        out = (module == 0 ? G.ends[0] : module == 1 ? G.ends[1] : G.ends[2]) - start;
    }
};

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ void widen(float (&v)[4], uint2 bits) {
    v[0] = __uint_as_float(bits.x << 16), v[1] = __uint_as_float(bits.x & 0xffff0000);
    v[2] = __uint_as_float(bits.y << 16), v[3] = __uint_as_float(bits.y & 0xffff0000);
}

__device__ __forceinline__ uint2 load4(const u16* p) { return *reinterpret_cast<const uint2*>(p); }

// Weights go first when the L2 cache needs room: what is prefetched there, and activations, are read again.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Read once, past L1. Where `wanted` is false the registers keep what they hold: a plain condition would have the compiler
// load into others and wait to copy them.
__device__ __forceinline__ void load_once(uint4& v, const uint4* p, bool wanted, u64 policy) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0;"
                 "  @p ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4], %6; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"(u32(wanted)), "l"(policy));
}

__device__ __forceinline__ void load_once(float2& v, const float2* p, bool wanted, u64 policy) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0;"
                 "  @p ld.global.nc.L1::no_allocate.L2::cache_hint.v2.f32 {%0,%1}, [%2], %4; }"
                 : "+f"(v.x), "+f"(v.y) : "l"(p), "r"(u32(wanted)), "l"(policy));
}

// L1 is what shared memory leaves: a few KiB.
__device__ __forceinline__ void load_past_L1(u32 (&v)[4], const u16* p) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p));
}

__device__ __forceinline__ void store_cluster(u32 address, u32 rank, float v) {
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.f32 [a], %2; }"
                 :: "r"(address), "r"(rank), "f"(v) : "memory");
}

// Barriers in shared memory. What a warp wrote before it arrives, whoever waits can read.
__device__ __forceinline__ void arrive(u32 barrier, u32 rank) {
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %0, %1;"
                 "  mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a]; }" :: "r"(barrier), "r"(rank) : "memory");
}

__device__ __forceinline__ void await(u32 barrier, u32 parity) {
    u32 done;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;"
                     "  selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    while (!done);
}

// Of the warps of one kind.
template <int WHICH, int COUNT>
__device__ __forceinline__ void sync() {
    asm volatile("bar.sync %0, %1;" :: "n"(WHICH), "n"(COUNT) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, u32 v) {
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(v) : "memory");
}

// 16 bytes from global to shared memory while other work goes on; zeros where `bytes` is 0.
__device__ __forceinline__ void copy16(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The B fragments of two products: 8 rows times 32 columns of x. Lane l names the address of 16 bytes of row l % 8.
__device__ __forceinline__ void load_matrices(u32 (&b)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address));
}

#if WGMMA
// d (64, ROWS), of four warps, is a (64, 16) times x (ROWS, 16), or that added to it. Runs on until it is waited for.
__device__ __forceinline__ void wgmma(float (&d)[EIGHTS][4], const u32* a, u32 x_at, bool add) {
    // PTX's matrix descriptor: eights of rows are 1024 bytes apart, 128-byte swizzle.
    const u64 x = 1ull << 62 | 64ull << 32 | x_at;
#if EIGHTS == 4
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %21, 0;"
                 "  wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16"
                 "  {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0; }"
                 : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
                   "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
                   "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(u32(add)));
#else
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %13, 0;"
                 "  wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
                 "  {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0; }"
                 : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
                   "+f"(d[1][2]), "+f"(d[1][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(u32(add)));
#endif
}

// Keeps the compiler from reading d before it has been waited for.
__device__ __forceinline__ void pin(float (&d)[EIGHTS][4]) {
#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
        asm volatile("" : "+f"(d[e][0]), "+f"(d[e][1]), "+f"(d[e][2]), "+f"(d[e][3]) :: "memory");
}

template <int LEFT>
__device__ __forceinline__ void await_wgmma() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}
#endif

// As the compiler sees that all lanes have the same.
__device__ __forceinline__ int own_warp() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

__device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ __forceinline__ u32 cluster_size() {
    u32 r;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
    return r;
}

#if KIND == 4
__constant__ float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The register that byte I of a word stands for: an entry of the lane's copy of the table. One shift, one logical
// operation (the lane's place in the table is or-ed in), one load.
template <int I>
__device__ __forceinline__ u32 lookup(u32 place, u32 word) {
    u32 r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"((I == 0 ? word << 7 : word >> (8 * I - 7)) & 0x7f80 | place));
    return r;
}
#endif

// The bytes I and I + 1 of a word, signed, as bf16: 128 or 256 is taken from 128 and the lower seven bits, which is exact.
template <int I>
__device__ __forceinline__ u32 signed_pair(u32 word) {
    const u32 both = __byte_perm(word, 0x43434343, I == 0 ? 0x4140 : 0x4342);
    u32 r;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(both & 0xff7fff7f), "r"(both & 0xff80ff80));
    return r;
}

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

// What adapters add to the CTA's outputs, B low. By the SIDE warps; those that have multiplied help in the end.
struct Adapters {
    const Group& G;
    const Entry* entries;
    u16* low;  // (rows, modules, 2, ranks of a segment) bf16
    int* taken;  // how many tasks have been
    int thread = threadIdx.x - WARPS * 32, lane = threadIdx.x % 32;

    __device__ void read_entries(Entry* to) {
        for (int i = thread; i < G.rows * G.modules; i += SIDE * 32) {
            const int position = G.positions[i / G.modules];
            Entry entry = {0, 0, 0, position < 0 ? -1 : 0, 0};
            const i64 table = G.adapters[i / G.modules];
            if (position >= 0 && table) {
                const i64* e = reinterpret_cast<const i64*>(table);
                e += (i64(position) * G.all_modules + G.first + i % G.modules) * ENTRY;
                entry = {reinterpret_cast<const u16*>(e[1]), reinterpret_cast<const u16*>(e[2]),
                         reinterpret_cast<const u16*>(e[3]), int(e[4]), 0};
            }
            to[i] = entry;
        }
    }

    // Of row `lane`, over all modules; -1 where it passes through.
    __device__ int ranks_of_row() {
        int ranks = -1;
        for (int i = 0; lane < G.rows && i < G.modules; i++) ranks = max(ranks, entries[lane * G.modules + i].rank);
        return ranks;
    }

    // A segment of ranks of A x, from its parts, for some of the modules; each as the sum of two bf16, the first of all ranks
    // before the second. Zeros follow, up to a multiple of 16.
    __device__ void sum_low(int from, int first_module, int last_module) {
        const int most = min(__reduce_max_sync(~0u, ranks_of_row()) - from, G.rank_segment);
        const int fours = (most + 15) / 16 * 4, modules = last_module - first_module + 1, all = G.rows * modules * fours;
        const i64 stride = G.modules * G.ranks;
        for (int i = thread; i < all; i += 2 * SIDE * 32) {  // two at a time: each waits for memory
            const float* part[2];
            int to[2], left[2];
            float sum[2][4] = {};
#pragma unroll
            for (int u = 0; u < 2; u++) {
                const int at = min(i + u * SIDE * 32, all - 1), j = at % fours * 4, module = first_module + at / fours % modules;
                const int m = at / fours / modules;
                left[u] = entries[m * G.modules + module].rank - from - j;
                part[u] = G.low + m * G.parts * stride + module * G.ranks + from + j;
                to[u] = (m * G.modules + module) * G.rank_segment * 2 + j;
            }
#pragma unroll 4
            for (int p = 0; p < G.parts; p++)
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
                *reinterpret_cast<uint2*>(low + to[u]) = bits;
                *reinterpret_cast<uint2*>(low + to[u] + G.rank_segment) =
                    make_uint2(pack_bf16(sum[u][0], sum[u][1]), pack_bf16(sum[u][2], sum[u][3]));
            }
        }
    }

    // A task is 64 outputs of a row. B is the A operand, (16 outputs, 16 ranks) four times; the B operand has the two halves of
    // A x as columns, for module after module. So lane t has the sums of module t: those of an output's own module are wanted.
    __device__ void add(int from, float* added, int first_output, int outputs) {
        const int groups = (outputs + 63) / 64, tasks = outputs > 0 ? groups * G.rows : 0;
        const int row_ranks = ranks_of_row(), g = lane / 4, t = lane % 4;
        const float by_groups = 1.0f / groups;
        const u32 added_at = u32(__cvta_generic_to_shared(added)), low_begin = u32(__cvta_generic_to_shared(low));
        int ranks = 0;  // to come of the row
        int at = 0, last = 0, out = 0;  // the lane's first rank of the piece, and the last one of its module
        u32 low_at = 0, to = 1;
        const u16* B = 0;
        auto next = [&] {
            for (;;) {
                int task = 0;
                if (lane == 0) task = atomicAdd(taken, 1);
                task = __shfl_sync(~0u, task, 0);
                if (task >= tasks) return false;
                const int row = (task + 0.5f) * by_groups, local = (task - row * groups) * 64 + g * 8;
                ranks = min(__shfl_sync(~0u, row_ranks, row) - from, G.rank_segment);
                if (ranks <= 0) continue;
                const bool inside = local < outputs;
                const Output of(G, first_output + (inside ? local : 0));
                const Entry& entry = entries[row * G.modules + of.module];
                const bool there = entry.rank > from;
                to = inside && there && t == of.module ? added_at + (row * G.stride + local) * 4 : 1;
                at = from + 2 * t, last = there ? min(entry.rank, from + G.rank_segment) - 1 : 0;
                B = there ? entry.B + of.inner : reinterpret_cast<const u16*>(G.weights), out = there ? of.out : 0;
                low_at = low_begin + (((row * G.modules + min(g / 2, G.modules - 1)) * 2 + g % 2) * G.rank_segment + 2 * t) * 2;
                return true;
            }
        };
        auto fetch = [&](Piece& P) {
            P.low = 0;
            if (ranks <= 0 && !next()) return;
#pragma unroll
            for (int i = 0; i < 4; i++)  // beyond the last rank it is multiplied with 0
                load_past_L1(P.b[i], B + i64(min(at + i % 2 + i / 2 * 8, last)) * out);
            P.low = low_at;
            ranks -= 16, at += 16, low_at += 32;
            P.to = ranks <= 0 ? to : 0;
        };
        float v[4][4] = {};
        auto use = [&](const Piece& P) {
            u32 low0, low8;
            asm volatile("ld.shared.u32 %0, [%2]; ld.shared.u32 %1, [%2 + 16];" : "=r"(low0), "=r"(low8) : "r"(P.low));
#pragma unroll
            for (int q = 0; q < 4; q++)
                mma(v[q], __byte_perm(P.b[0][q], P.b[1][q], 0x5410), __byte_perm(P.b[0][q], P.b[1][q], 0x7632),
                    __byte_perm(P.b[2][q], P.b[3][q], 0x5410), __byte_perm(P.b[2][q], P.b[3][q], 0x7632), low0, low8);
            if (!P.to) return;
            float4* to = reinterpret_cast<float4*>(__cvta_shared_to_generic(P.to));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                auto& even = v[half * 2];
                auto& odd = v[half * 2 + 1];
                float4 sum = make_float4(even[0] + even[1], even[2] + even[3], odd[0] + odd[1], odd[2] + odd[3]);
                if (!(P.to & 1)) {
                    if (from > 0) sum.x += to[half].x, sum.y += to[half].y, sum.z += to[half].z, sum.w += to[half].w;
                    to[half] = sum;
                }
                for (int q = 0; q < 4; q++) even[q] = odd[q] = 0;
            }
        };
        Piece pieces[AHEAD + 1];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) fetch(pieces[i]);
        for (;;)
#pragma unroll
            for (int i = 0; i < AHEAD + 1; i++) {
                fetch(pieces[(i + AHEAD) % (AHEAD + 1)]);
                if (!pieces[i].low) return;
                use(pieces[i]);
            }
    }
};

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
    Entry* entries = reinterpret_cast<Entry*>(shared + G.entries_at + 32);
    Adapters adapters{G, entries, reinterpret_cast<u16*>(entries + G.rows * G.modules),
                      reinterpret_cast<int*>(shared + G.entries_at + 24)};
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(full), "r"(WARPS * size) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(empty), "r"(size) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(ready), "r"(SIDE * 32) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");

    if (warp >= WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(SIDE_REGISTERS));
        adapters.read_entries(entries);
        sync<2, SIDE * 32>();
        const int first_module = Output(G, first_tile * 16).module, last_module = Output(G, end_tile * 16 - 1).module;
        int tile = first_tile;
        for (int i = 0; i < G.rounds; i++) {
            const Round round(G, tile, end_tile, G.rounds - i, size);
            const int first_output = round.tile * 16 + rank * round.share;
            const int outputs = min(round.share, round.tiles * 16 - int(rank) * round.share);
            if (i == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
            for (int from = 0; from < G.ranks; from += G.rank_segment) {
                if (from > 0 || i > 0) sync<2, SIDE * 32>();
                if (adapters.thread == 0) *adapters.taken = 0;
                if (i == 0 || G.ranks > G.rank_segment) adapters.sum_low(from, first_module, last_module);
                sync<2, SIDE * 32>();
                if (i + 1 == G.rounds && from + G.rank_segment >= G.ranks) arrive(ready, rank);
                adapters.add(from, added, first_output, outputs);
            }
            if (i == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
            if (i == 0 && G.in_place) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
            if (i + 1 == G.rounds) break;
            sync<2, SIDE * 32>();
            write_outputs(G, round, sums_in, added, entries, full, i & 1, rank, size, warp - WARPS, SIDE);
            sync<2, SIDE * 32>();
            if (adapters.thread < size) arrive(empty, adapters.thread);
            tile += round.tiles;
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
        const int all_chunks = G.columns / CHUNK;
        const int begin = all_chunks * rank / size, chunks = all_chunks * (rank + 1) / size - begin;
        const u64 policy = read_once();
        const i64 row = G.columns * KIND / 128;  // of the weight, in 16 bytes
        const uint4* w[TILES];
        const float* s[TILES];
        uint4 bytes[DEPTH][TILES][PLANES];
        float2 scale[DEPTH][TILES];
        auto load = [&](int d, int ahead, bool wanted) {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
#pragma unroll
                for (int p = 0; p < PLANES; p++) {
                    const i64 plane = KIND == 16 ? p / 2 * 8 * row + p % 2 * 4 : p * 8 * row;
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
            asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p prefetch.global.L2 [%0]; }"
                         :: "l"(line + d * line_step), "r"(u32(wanted)));
        };
        auto start = [&](const Round& round) {
            const int per_tile = KIND == 4 ? 8 : 16;
            const i64 tile = min(round.tile + warp * TILES + lane / per_tile % TILES, G.tiles - 1);
            if (KIND == 4) {
                const bool scales = lane % per_tile == 4;
                const i64 at = tile * all_chunks + begin;
                line = scales ? reinterpret_cast<const char*>(G.scales + at * 16)
                              : reinterpret_cast<const char*>(G.weights + at * 32) + lane % 4 * 128;
                line_step = scales ? 64 : 512;
            } else {
                line = reinterpret_cast<const char*>(G.weights + (tile * 16 + lane % per_tile) * row + begin * STEP);
                line_step = STEP * 16;
            }
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const i64 at = min(round.tile + warp * TILES + i, G.tiles - 1);
                if (KIND == 4) {
                    w[i] = G.weights + (at * all_chunks + begin) * 32 + lane;
                    s[i] = G.scales + (at * all_chunks + begin) * 16 + 2 * g;
                } else {
                    w[i] = G.weights + (at * 16 + g) * row + begin * STEP + t;
                    s[i] = G.scales + at * 16 + g;
                }
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
        // x as tensor cores read it, a chunk's rows under one another; each row's eight times 16 bytes change places by the row's
        // number, so that the same 16 bytes of eight rows are in different banks (PTX's 128-byte swizzle).
#pragma unroll 4
        for (int i = threadIdx.x; i < chunks * ROWS * 8; i += WARPS * 32) {
            const int eight = i % 8, m = i / 8 % ROWS, chunk = i / (8 * ROWS);
            const bool there = m < G.rows;
            const u16* from = G.x + i64(there ? m : 0) * G.columns + (begin + chunk) * CHUNK + eight * 8;
            const u32 to = x + (chunk * ROWS + m) * 128;
#if KIND == 4
            copy16(to + (eight ^ m % 8) * 16, from, there ? 16 : 0);
#else
            // Lane t's own neighbouring columns, two at a time, go where A has them: 2t and 2t + 8 of each 16.
            const uint4 v = there ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
            const int half = KIND == 8 ? eight % 2 : eight / 4, t = KIND == 8 ? eight / 2 : eight % 4;
            const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int q = 0; q < 4; q++) store_shared(to + (half * 4 + q ^ m % 8) * 16 + t * 4, words[q]);
#endif
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
        if (WGMMA) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        sync<1, WARPS * 32>();

        // A's eight registers for 16 rows and half a chunk.
        auto fragments = [&](u32 (&a)[8], const uint4 (&v)[PLANES], int half) {
#if KIND == 4
            const u32 g0 = half ? v[0].y : v[0].x, g8 = half ? v[0].w : v[0].z, place = base + G.table_at + lane * 4;
            a[0] = lookup<0>(place, g0), a[1] = lookup<0>(place, g8), a[2] = lookup<1>(place, g0), a[3] = lookup<1>(place, g8);
            a[4] = lookup<2>(place, g0), a[5] = lookup<2>(place, g8), a[6] = lookup<3>(place, g0), a[7] = lookup<3>(place, g8);
#elif KIND == 8
            const u32 g0 = half ? v[0].z : v[0].x, g8 = half ? v[1].z : v[1].x;
            const u32 h0 = half ? v[0].w : v[0].y, h8 = half ? v[1].w : v[1].y;
            a[0] = signed_pair<0>(g0), a[1] = signed_pair<0>(g8), a[2] = signed_pair<2>(g0), a[3] = signed_pair<2>(g8);
            a[4] = signed_pair<0>(h0), a[5] = signed_pair<0>(h8), a[6] = signed_pair<2>(h0), a[7] = signed_pair<2>(h8);
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
                // Half a chunk is multiplied while the next one's A is made. A chunk is finished, scaled and its registers loaded anew,
            // while the next one begins. All of DEPTH chunks are finished at the end: what is on its way there, the compiler
            // would have wait each time.
            static_assert(TILES == 1 && DEPTH % 2 == 0, "");
            u32 x_at = 1u << 16 | (x & 0x3ffff) >> 4;
            float parts[2][TILES][EIGHTS][4] = {};
            u32 a[2][8];
            auto multiply = [&](int d, int half) {
                fragments(a[half], bytes[d][0], half);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int k = 0; k < 2; k++)
                    wgmma(KIND == 4 ? parts[d % 2][0] : sums[0], a[half] + k * 4, x_at + d * ROWS * 8 + half * 4 + k * 2,
                          KIND != 4 || half + k > 0);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                await_wgmma<1>();
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
        adapters.add((G.ranks - 1) / G.rank_segment * G.rank_segment, added, round.tile * 16 + rank * round.share,
                     min(round.share, round.tiles * 16 - int(rank) * round.share));
    }
    __syncthreads();
    write_outputs(G, round, sums_in, added, entries, full, G.rounds - 1 & 1, rank, size, warp, WARPS + SIDE);
}

#if KIND == 4
// W (outputs, columns) in bf16: code times scale in fp32, rounded once, as bitsandbytes does.
extern "C" __global__ void nf4_dequantize(const uint4* weights, const float2* scales, u16* out, int columns, i64 units) {
    const i64 unit = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (unit >= units) return;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, chunks = columns / CHUNK;
    const i64 tile = unit / chunks, chunk = unit % chunks;
    uint4 bytes;
    float2 scale;
    load_once(bytes, weights + unit * 32 + lane, true, read_once());
    load_once(scale, scales + unit * 8 + g, true, read_once());
    const float own = NF4[lane & 15];  // from lane to lane: constant memory serves one address at a time
    auto value = [&](u32 code) { return __shfl_sync(~0u, own, code); };
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 g0 = half ? bytes.z : bytes.x, g1 = half ? bytes.w : bytes.y;
        const float by = half ? scale.y : scale.x;
        // Lane t has 2t and 2t + 8 of each 16 columns and gets the t-th 16 columns from the lanes t, t ^ 1, t ^ 2, t ^ 3.
        u32 codes[4];
#pragma unroll
        for (int other = 0; other < 4; other++) {
            const int j = t ^ other;
            codes[other] = __shfl_xor_sync(~0u, (j & 2 ? g1 : g0) >> (j & 1) * 16, other);
        }
        auto order = [&](u32& a, u32& b, bool change) {
            const u32 first = change ? b : a;
            b = change ? a : b, a = first;
        };
        order(codes[0], codes[1], t & 1), order(codes[2], codes[3], t & 1);
        order(codes[0], codes[2], t & 2), order(codes[1], codes[3], t & 2);
        uint4* to = reinterpret_cast<uint4*>(out + (tile * 16 + g + half * 8) * columns + chunk * CHUNK + t * 16);
#pragma unroll
        for (int eight = 0; eight < 2; eight++) {
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 byte = codes[j] >> eight * 8 & 255;
                pairs[j] = pack_bf16(value(byte >> 4) * by, value(byte & 15) * by);
            }
            to[eight] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}
#endif
