// The prefill GEMM: y = x Wᵀ for many rows of x, with W in NF4 and y in bf16 or fp32 (OUT bits). A cluster computes 16 WARPS
// outputs of ROWS rows. Its CTAs split the columns of W.
//
// Each of WARPS warps has a tile, 16 outputs (nf4.py). It makes wgmma's A operand in registers: it looks up, scales and rounds
// half a chunk of 64 columns while the tensor cores multiply the half before. More warps hide more of each other's look-ups.
// The B operand is x. Another warp has TMA copy it to shared memory, as many chunks ahead as there are stages; so all that the
// others do is the same in all of their threads, and the compiler keeps addresses in uniform registers.
#include "nf4.cuh"
#include "wgmma.cuh"

#define CHUNK 64         // columns
#define STAGE_BYTES (ROWS * CHUNK * 2)
#define RESERVED 1024    // bytes at the beginning of shared memory that the device reserves
#define TABLE_AT 32768   // address of the table of pairs, a multiple of 32768: lookup() ors an index into it
#define STAGES_AT 65536  // address of the stages: chunks of x, ROWS rows each
#define STAGES ((228 * 1024 - STAGES_AT) / STAGE_BYTES)
#define DEPTH (ROWS == 128 && WARPS == 16 ? 3 : 4)  // chunks of its tile that a warp loads ahead, into registers

#define REGISTERS (WARPS == 16 ? 112 : 240)  // of a thread that multiplies, once the others have given theirs

constexpr int EIGHTS = ROWS / 8, HALVES = ROWS > 128 ? 2 : 1;  // ROWS / 8; wgmma instructions for ROWS rows

// A scale as the sum of two bf16 numbers. Its product with a pair of bf16 numbers takes two instructions and is rounded once.
struct Scale {
    u32 high, low;
    __device__ __forceinline__ Scale(float scale) {
        high = pack_bf16(scale, scale);
        const float left = scale - __uint_as_float(high & 0xffff0000);
        low = pack_bf16(left, left);
    }
    __device__ __forceinline__ u32 times(u32 pair) const {
        return mul_bf16x2(pair, high, low);
    }
};

struct GemmArguments {
    const uint4* weights;             // (tiles, chunks, 32), 16 bytes for each lane
    const float2* scales;             // (tiles, chunks, 8), of the rows g and g + 8 of a tile
    void* y;                          // (rows, outputs), bf16 or fp32
    int rows, tiles, chunks, stride;  // rows of x; the weight's tiles and chunks; the stride of y's rows, in numbers
};

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 128) prefill_gemm(const __grid_constant__ TensorMap map, GemmArguments args) {
    extern __shared__ char shared[];
    const u32 base = u32(__cvta_generic_to_shared(shared));
    const u32 full = base, empty = base + STAGES * 8, table = base - RESERVED + TABLE_AT, x = base - RESERVED + STAGES_AT;
    const int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4;
    const int rank = cluster_rank(), size = cluster_size(), cluster = blockIdx.x / size;
    // Clusters with neighbouring numbers read the same weights: they run at the same time and share the L2 cache.
    const int blocks = (args.rows + ROWS - 1) / ROWS, first_tile = cluster / blocks * WARPS;
    int first_row = cluster % blocks * ROWS;
    const int begin = args.chunks * rank / size, chunks = args.chunks * (rank + 1) / size - begin;

    if (threadIdx.x == 0) {
        if (table % TABLE_AT) __trap();
        for (int i = 0; i < STAGES; i++) {
            init_barrier(full + i * 8, 1);
            init_barrier(empty + i * 8, WARPS);
        }
        fence_barrier_init();
    }
    for (int entry = warp; entry < 256; entry += WARPS + 4)
        store_shared(table + (entry * 32 + lane) * 4, pack_bf16(NF4[entry >> 4], NF4[entry & 15]));
    __syncthreads();
    launch_dependents();

    if (warp >= WARPS) {
        // A thread behind those that multiply fetches x. It refills a stage when all of them have multiplied its chunk. Its three
        // neighbours are there because registers change hands by four warps.
        give_registers<24>();
        await_previous_kernel();
        if (threadIdx.x == WARPS * 32)
            for (int chunk = 0, stage = 0, parity = 1; chunk < chunks; chunk++) {
                if (chunk >= STAGES) await_own(empty + stage * 8, parity);
                fetch_tensor<STAGE_BYTES>(x + stage * STAGE_BYTES, map, (begin + chunk) * CHUNK, first_row, full + stage * 8);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        return;
    }
    take_registers<REGISTERS>();

    const u64 policy = evict_first_policy();
    const i64 tile = min(first_tile + warp, args.tiles - 1);
    const uint4* w = args.weights + (tile * args.chunks + begin) * 32 + lane;
    const float2* s = args.scales + (tile * args.chunks + begin) * 8 + g;
    uint4 bytes[DEPTH];
    float2 scale[DEPTH];
    auto load = [&](int d, int ahead, bool wanted) {
        load_once(bytes[d], w + (d + ahead) * 32, wanted, policy);
        load_once(scale[d], s + (d + ahead) * 8, wanted, policy);
    };
    int left = chunks;
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        bytes[d] = make_uint4(0, 0, 0, 0), scale[d] = make_float2(0, 0);
        load(d, 0, d < left);
    }

    u32 place = table + lane * 4;
    hide(place);  // lookups must not precede the table
    float sums[HALVES][EIGHTS / HALVES][4] = {};
    int stage = 0, before = -1;
    u32 parity = 0;
    // Makes A for half of chunk d of DEPTH.
    auto look_up = [&](u32 (&own)[8], int d, int half, const Scale& g0, const Scale& g8) {
        const u32 low = half ? bytes[d].y : bytes[d].x, high = half ? bytes[d].w : bytes[d].z;
        own[0] = g0.times(lookup<0>(place, low)), own[1] = g8.times(lookup<0>(place, high));
        own[2] = g0.times(lookup<1>(place, low)), own[3] = g8.times(lookup<1>(place, high));
        own[4] = g0.times(lookup<2>(place, low)), own[5] = g8.times(lookup<2>(place, high));
        own[6] = g0.times(lookup<3>(place, low)), own[7] = g8.times(lookup<3>(place, high));
    };
    // Begins the products of a half with the rows of x.
    auto begin_half = [&](u32 (&own)[8], int half, u32 from) {
        begin_wgmma();
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int half_rows = 0; half_rows < HALVES; half_rows++)
                wgmma(sums[half_rows], own + k * 4, from + half_rows * 1024 + (half * 2 + k) * 2, true);
        commit_wgmma();
    };
    u32 a[2][8];
    auto multiply = [&](int d, bool more) {
        const Scale g0(scale[d].x), g8(scale[d].y);
        const u32 from = 1u << 16 | (x + stage * STAGE_BYTES & 0x3ffff) >> 4;
        look_up(a[0], d, 0, g0, g8);
        await_own(full + stage * 8, parity);
        begin_half(a[0], 0, from);
        await_wgmma<1>();  // all products of the chunk before are complete
        if (lane == 0 && before >= 0) arrive(empty + before * 8);
        look_up(a[1], d, 1, g0, g8);
        begin_half(a[1], 1, from);
        await_wgmma<1>();
        load(d, DEPTH, more);
        before = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
    };
    for (; left >= DEPTH; left -= DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) multiply(d, d + DEPTH < left);
        w += DEPTH * 32, s += DEPTH * 8;
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (d < left) multiply(d, false);
    await_wgmma<0>();
#pragma unroll
    for (int half_rows = 0; half_rows < HALVES; half_rows++) pin(sums[half_rows]);

    int eights = EIGHTS;  // of rows that the CTA finishes
    if (size > 1) {
        // Each CTA adds up the sums of its share of the rows. They replace x in shared memory once all CTAs have multiplied.
        const int share = (EIGHTS + 2 * size - 1) / (2 * size) * 2;  // even: eights are stored by twos
        const u32 own = x + warp * share * 512 + lane * 16;
        cluster_sync();
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
            store_cluster(map_cluster(own + (rank * WARPS * share + e % share) * 512, e / share),
                          sums[e * HALVES / EIGHTS][e % (EIGHTS / HALVES)]);
        cluster_sync();
#pragma unroll
        for (int e = 0; e < EIGHTS / 2; e++)
            if (e < share && rank * share + e < EIGHTS) {
                float4 sum = load_shared(own + e * 512);
                for (int other = 1; other < size; other++) {
                    const float4 v = load_shared(own + (other * WARPS * share + e) * 512);
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                auto& to = sums[e * HALVES / EIGHTS][e % (EIGHTS / HALVES)];
                to[0] = sum.x, to[1] = sum.y, to[2] = sum.z, to[3] = sum.w;
            }
        first_row += rank * share * 8, eights = max(0, min(share, int(EIGHTS - rank * share)));
    }
    const int rows = min(eights * 8, args.rows - first_row);
#if OUT == 32
    if (first_tile + warp < args.tiles) {
        float* y = reinterpret_cast<float*>(args.y) + i64(first_row) * args.stride + (first_tile + warp) * 16 + g;
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = e * 8 + lane % 4 * 2 + i % 2;
                if (row < rows) y[i64(row) * args.stride + i / 2 * 8] = sums[e * HALVES / EIGHTS][e % (EIGHTS / HALVES)][i];
            }
    }
#else
    // Outputs of a row are neighbours in y, but not in a lane. They are transposed in shared memory, in the place of x.
    sync<1, WARPS * 32>();
    const u32 own = x + warp / 4 * ROWS * 128;  // where four warps store 64 outputs of each row, in the 128-byte swizzle
    const u32 unit = warp % 4 * 2 + lane / 8 % 2, to = own + (lane / 16 * 8 + lane % 8) * 128 + (unit ^ lane % 8) * 16;
#pragma unroll
    for (int e = 0; e < EIGHTS; e += 2)
        if (e < eights) {
            const auto& low = sums[e * HALVES / EIGHTS][e % (EIGHTS / HALVES)];
            const auto& high = sums[e * HALVES / EIGHTS][e % (EIGHTS / HALVES) + 1];
            store_transposed(to + e * 1024, pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]),
                             pack_bf16(high[0], high[1]), pack_bf16(high[2], high[3]));
        }
    sync<128>(2 + warp / 4);
    const int first = first_tile + warp / 4 * 4, at = threadIdx.x % 128, column = at % 8;
    u16* y = reinterpret_cast<u16*>(args.y) + i64(first_row) * args.stride + first * 16 + column * 8;
    if (first + column / 2 < args.tiles)
        for (int row = at / 8; row < rows; row += 16) {
            const float4 v = load_shared(own + row * 128 + (column ^ row % 8) * 16);
            *reinterpret_cast<float4*>(y + i64(row) * args.stride) = v;
        }
#endif
}
