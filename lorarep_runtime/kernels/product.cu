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
// A warp owns TILES tiles at a time. The CTAs of a cluster share the tiles and split the columns; they add up their sums
// through distributed shared memory, in the same order every time. Then they go on to their next tiles: x stays.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

#define ENTRY 5
#define CHUNK 64
#define ROWS (EIGHTS * 8)
#define AHEAD (EIGHTS == 1 ? 8 : 16)  // loads of B that a thread has on their way
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
    int tiles_per_cta, rank_segment;
    int share;                // of a CTA's outputs, how many each CTA of a cluster finishes; a multiple of four
    int table_at, x_at, sums_at, entries_at;  // in shared memory, bytes
};

struct Entry {  // of one row's adapter for one module; a rank of -1 is a row that passes through
    const u16 *B, *c, *bias;
    i64 rank;
};

struct Task {  // of a lane: four outputs of a row, or every few ranks of them
    u16* y;  // null where there is nothing to do
    const float *sums, *low;
    int ranks, splits, split;  // of the adapter; among so many lanes, whose number this is
    bool has_c;
    uint2 c, plus[3], b[AHEAD];  // bf16
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

__device__ __forceinline__ void store_cluster(u32 address, u32 rank, float v) {
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.f32 [a], %2; }"
                 :: "r"(address), "r"(rank), "f"(v) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, u32 v) {
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(v) : "memory");
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }

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
__device__ __forceinline__ void wgmma(float (&d)[EIGHTS][4], const u32* a, u64 x, bool add) {
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

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) product(const __grid_constant__ Group G) {
    extern __shared__ __align__(128) unsigned char shared[];
    const u32 rank = cluster_rank(), size = cluster_size();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int all_chunks = G.columns / CHUNK;
    const int begin = all_chunks * rank / size, chunks = all_chunks * (rank + 1) / size - begin;
    int cta_tile = blockIdx.x / size * G.tiles_per_cta;

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
    auto point = [&] {  // at the tiles from cta_tile on
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const i64 at = min(cta_tile + warp * TILES + i, G.tiles - 1);
            if (KIND == 4) {
                w[i] = G.weights + (at * all_chunks + begin) * 32 + lane;
                s[i] = G.scales + (at * all_chunks + begin) * 16 + 2 * g;
            } else {
                w[i] = G.weights + (at * 16 + g) * row + begin * STEP + t;
                s[i] = G.scales + at * 16 + g;
            }
        }
    };
    auto start = [&] {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                for (int p = 0; p < PLANES; p++) bytes[d][i][p] = make_uint4(0, 0, 0, 0);
                scale[d][i] = make_float2(0, 0);
            }
            load(d, 0, d < chunks);
        }
#pragma unroll
        for (int i = 0; i < TILES; i++)
            if (KIND == 8) scale[0][i] = make_float2(s[i][0] * (1.0f / 127), s[i][8] * (1.0f / 127));
    };
    // Weights do not depend on what came before: the first ones are on their way while it ends.
    point(), start();
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");

    const u32 base = u32(__cvta_generic_to_shared(shared));
#if KIND == 4
    if (base + G.table_at & 0x7fff) __trap();  // these bits are an index
    u32* table = reinterpret_cast<u32*>(shared + G.table_at);
    for (int first = warp * 32; first < 256; first += THREADS) {
        const u32 own = pack_bf16(NF4[first + lane >> 4], NF4[lane & 15]);
        for (int i = 0; i < 32; i++) table[(first + i) * 32 + lane] = __shfl_sync(~0u, own, i);
    }
#endif
    const int share = G.share;
    // The sums that the cluster's CTAs leave here, (CTAs, rows, share); x; adapters, and A x.
    float* sums_in = reinterpret_cast<float*>(shared + G.sums_at);
    const u32 x = base + G.x_at;
    Entry* entries = reinterpret_cast<Entry*>(shared + G.entries_at);
    float* low = reinterpret_cast<float*>(entries + G.rows * G.modules);

    // Nor do adapters depend on what came before.
    for (int i = threadIdx.x; i < G.rows * G.modules; i += THREADS) {
        const int position = G.positions[i / G.modules];
        Entry entry = {0, 0, 0, position < 0 ? -1 : 0};
        const i64 table = G.adapters[i / G.modules];
        if (position >= 0 && table) {
            const i64* e = reinterpret_cast<const i64*>(table);
            e += (i64(position) * G.all_modules + G.first + i % G.modules) * ENTRY;
            entry = {reinterpret_cast<const u16*>(e[1]), reinterpret_cast<const u16*>(e[2]),
                     reinterpret_cast<const u16*>(e[3]), e[4]};
        }
        entries[i] = entry;
    }

    __syncthreads();
    const int end = G.tiles * 16;
    int first_output = cta_tile * 16 + rank * share;
    auto prefetch_adapters = [&] {
        const Output at(G, first_output);
        for (int i = threadIdx.x; i < G.rows * 64; i += THREADS) {
            const Entry entry = entries[i / 64 * G.modules + at.module];
            if (i % 64 < entry.rank)
                for (int n = 0; n < share && first_output + n < end; n += 64)
                    prefetch(entry.B + i64(i % 64) * at.out + at.inner + n);
        }
    };
    prefetch_adapters();
    // Of row `lane`, over all modules; -1 where it passes through.
    auto ranks_of_row = [&] {
        int ranks = -1;
        for (int i = 0; lane < G.rows && i < G.modules; i++) ranks = max(ranks, int(entries[lane * G.modules + i].rank));
        return ranks;
    };
    auto sum_low = [&](int from) {  // of a segment of ranks
        const int ranks = min(__reduce_max_sync(~0u, ranks_of_row()) - from, G.rank_segment);
        const int stride = G.modules * G.ranks, all = G.rows * G.modules * ranks;
        for (int i = threadIdx.x; i < all; i += 4 * THREADS) {  // four at a time: each waits for memory
            const float* part[4];
            bool there[4];
            float sum[4] = {};
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int at = (i + u * THREADS) / ranks, j = (i + u * THREADS) % ranks;
                there[u] = i + u * THREADS < all && from + j < entries[at].rank;
                part[u] = G.low + i64(at / G.modules) * G.parts * stride + at % G.modules * G.ranks + from + j;
            }
#pragma unroll 4
            for (int p = 0; p < G.parts; p++)
#pragma unroll
                for (int u = 0; u < 4; u++)
                    if (there[u]) sum[u] += part[u][p * stride];
#pragma unroll
            for (int u = 0; u < 4; u++)
                if (there[u])
                    low[(i + u * THREADS) / ranks * G.rank_segment + (i + u * THREADS) % ranks] = sum[u];
        }
    };

    asm volatile("griddepcontrol.wait;" ::: "memory");
    // x as tensor cores read it, a chunk's rows under one another; each row's eight times 16 bytes change places by the row's
    // number, so that the same 16 bytes of eight rows are in different banks (PTX's 128-byte swizzle).
#pragma unroll 4
    for (int i = threadIdx.x; i < chunks * ROWS * 8; i += THREADS) {
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
    sum_low(0);
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (WGMMA) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();

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
    };
    for (bool first_tiles = true;; first_tiles = false) {
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int e = 0; e < EIGHTS; e++)
                for (int q = 0; q < 4; q++) sums[i][e][q] = 0;
        int left = chunks;
#if WGMMA
        // A chunk is multiplied while the next one's A is made; then it is finished: scaled, its registers loaded anew. All
        // of DEPTH chunks are finished at the end: what is on its way there, the compiler would have wait each time.
        // x_at is PTX's matrix descriptor: eights of rows are 1024 bytes apart, 128-byte swizzle.
        static_assert(TILES == 1 && DEPTH % 2 == 0, "");
        u64 x_at = 1ull << 62 | 64ull << 32 | 1ull << 16 | (x & 0x3ffff) >> 4;
        float parts[2][TILES][EIGHTS][4] = {};
        u32 a[2][2][8];
        auto multiply = [&](int d) {
            fragments(a[d % 2][0], bytes[d][0], 0), fragments(a[d % 2][1], bytes[d][0], 1);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < 4; k++)
                wgmma(KIND == 4 ? parts[d % 2][0] : sums[0], a[d % 2][k / 2] + k % 2 * 4, x_at + d * ROWS * 8 + k * 2,
                      KIND != 4 || k > 0);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        };
        auto finish = [&](int d) {
            if (KIND == 4) pin(parts[d % 2][0]), add_scaled(d, parts[d % 2]);
        };
        for (; left >= DEPTH; left -= DEPTH) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                multiply(d);
                await_wgmma<1>();
                if (d > 0) finish(d - 1), load(d - 1, DEPTH, d - 1 + DEPTH < left);
            }
            await_wgmma<0>();
            finish(DEPTH - 1), load(DEPTH - 1, DEPTH, DEPTH - 1 + DEPTH < left);
            x_at += DEPTH * ROWS * 8;
            advance();
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
            if (d < left) {
                multiply(d);
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

        cta_tile += gridDim.x / size * G.tiles_per_cta;
        const bool more = cta_tile < G.tiles;
        // Each CTA finishes its share of the outputs: the others' sums go to where it is.
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all of them have begun, or read the last sums
        const u32 sums_at = u32(__cvta_generic_to_shared(sums_in));
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const int n = (warp * TILES + i) * 16 + g + q / 2 * 8, owner = n / share;
#pragma unroll
                for (int e = 0; e < EIGHTS; e++)
                    store_cluster(sums_at + ((rank * ROWS + e * 8 + 2 * t + q % 2) * share + n % share) * 4, owner,
                                  sums[i][e][q]);
            }
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");

        // A lane finishes four neighbouring outputs of a row; where its ranks are many, several lanes share them, so that all
        // tasks are equally long. Lane m counts those of row m. A task's memory is on its way while the one before is finished.
        const int row_ranks = min(ranks_of_row(), G.rank_segment);
        int sharing = 1;
        while (sharing * AHEAD < row_ranks) sharing *= 2;
        const int fours = min(share, G.tiles_per_cta * 16 - int(rank) * share) / 4;
        const int tasks = row_ranks < 0 || fours <= 0 ? 0 : (fours * sharing + 31) / 32;
        int tasks_before = tasks;
        for (int other = 1; other < 32; other *= 2) {
            const int sum = __shfl_up_sync(~0u, tasks_before, other);
            if (lane >= other) tasks_before += sum;
        }
        const int all_tasks = __shfl_sync(~0u, tasks_before, 31);
        tasks_before -= tasks;
        auto fetch = [&](int index, int from) {
            Task T = {};
            if (index >= all_tasks) return T;
            const bool first = from == 0;
            const int m = __popc(__ballot_sync(~0u, tasks_before + tasks <= index));
            T.splits = __shfl_sync(~0u, sharing, m), T.split = lane % T.splits;
            const int local = ((index - __shfl_sync(~0u, tasks_before, m)) * 32 + lane) / T.splits * 4;
            const int n = first_output + local;
            const Output at(G, min(n, end - 1));
            const Entry entry = entries[m * G.modules + at.module];
            const int ranks = min(int(entry.rank) - from, G.rank_segment);
            if (local >= fours * 4 || n >= end || !(first || ranks > 0)) return T;
            T.y = G.y + i64(m) * end + n;
            T.sums = sums_in + m * share + local;
            T.low = low + (m * G.modules + at.module) * G.rank_segment;
            T.ranks = ranks;
            T.has_c = first && entry.c;
            if (T.has_c) T.c = load4(entry.c + at.inner);
            if (T.split == 0) {
                if (first && entry.bias) T.plus[0] = load4(entry.bias + at.inner);
                if (first && G.base_bias) T.plus[1] = load4(G.base_bias + n);
                if (!first || G.add) T.plus[2] = load4(T.y);
            }
            const u16* B = entry.B + i64(from + T.split) * at.out + at.inner;
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (T.split + i * T.splits < ranks) T.b[i] = load4(B + i64(i * T.splits) * at.out);
            return T;
        };
        auto finish_task = [&](const Task& T, bool first) {
            float v[4] = {}, wide[4];
            if (T.y && first) {
                for (u32 r = T.split; r < size; r += T.splits)
                    for (int q = 0; q < 4; q++) v[q] += T.sums[r * ROWS * share + q];
                widen(wide, T.c);
                for (int q = 0; q < 4; q++) v[q] *= T.has_c ? wide[q] : 1;
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (T.split + i * T.splits < T.ranks) {
                    widen(wide, T.b[i]);
                    const float a = T.low[T.split + i * T.splits];
                    for (int q = 0; q < 4; q++) v[q] += wide[q] * a;
                }
            for (int other = 1; other < T.splits; other *= 2)
                for (int q = 0; q < 4; q++) v[q] += __shfl_xor_sync(~0u, v[q], other);
            if (!T.y || T.split > 0) return;
            for (int i = 0; i < 3; i++) {
                widen(wide, T.plus[i]);
                for (int q = 0; q < 4; q++) v[q] += wide[q];
            }
            *reinterpret_cast<uint2*>(T.y) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
        };
        for (int from = 0; from < G.ranks; from += G.rank_segment) {
            if (from > 0 || (!first_tiles && G.ranks > G.rank_segment)) {
                __syncthreads();
                sum_low(from);
                __syncthreads();
            }
            Task now = fetch(warp, from);
            if (from == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
            for (int index = warp; index < all_tasks; index += THREADS / 32) {
                const Task next = fetch(index + THREADS / 32, from);
                finish_task(now, from == 0);
                now = next;
            }
        }
        if (!more) break;
        point(), start();
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // the sums here have been read
        first_output = cta_tile * 16 + rank * share;
        prefetch_adapters();
    }
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
