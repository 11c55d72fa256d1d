// y = x Wᵀ for many rows of x, with W in NF4: a cluster gives 128 outputs of ROWS rows, each of its CTAs from its own columns.
//
// Each of eight warps has a tile of 16 outputs (nf4.py) and makes the A operand of wgmma of it, in registers: a chunk's numbers
// are looked up, scaled and rounded to bf16 while the chunk before is multiplied. The B operand is x, which comes to
// shared memory through TMA some chunks ahead.
#include "nf4.cuh"
#include "wgmma.cuh"

#define CHUNK 64
#define WARPS 8
#define STAGE_BYTES (ROWS * CHUNK * 2)
#define RESERVED 1024    // bytes at the beginning of shared memory, for the device itself
#define TABLE_AT 32768   // from there, as all that follows: bits of the address are an index
#define STAGES_AT 65536
#define STAGES ((228 * 1024 - STAGES_AT) / STAGE_BYTES)
#define AHEAD (STAGES - 2)
#define DEPTH 4  // chunks of a weight that a warp has on their way

constexpr int EIGHTS = ROWS / 8, PARTS = ROWS > 128 ? 2 : 1;  // of rows; products that they take

// A scale as the sum of two numbers of bf16, so that its product with a pair of them takes two instructions and is rounded
// once.
struct Scale {
    u32 high, low;
    __device__ __forceinline__ Scale(float scale) {
        high = pack_bf16(scale, scale);
        const float left = scale - __uint_as_float(high & 0xffff0000);
        low = pack_bf16(left, left);
    }
    __device__ __forceinline__ u32 times(u32 pair) const {
        u32 r;
        asm("{ .reg .b32 t; mul.rn.bf16x2 t, %1, %3; fma.rn.bf16x2 %0, %1, %2, t; }" : "=r"(r) : "r"(pair), "r"(high), "r"(low));
        return r;
    }
};

struct alignas(64) TensorMap { char opaque[128]; };

struct Product {
    const uint4* weights;
    const float2* scales;
    void* y;
    int rows, tiles, chunks, stride;  // of y's rows, in numbers
};

__device__ __forceinline__ void fetch_x(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "n"(STAGE_BYTES) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

__device__ __forceinline__ float4 load_shared(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}

__device__ __forceinline__ void store_cluster(u32 address, const float (&v)[4]) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) nf4_matmul(const __grid_constant__ TensorMap map, Product P) {
    extern __shared__ char shared[];
    const u32 base = u32(__cvta_generic_to_shared(shared));
    const u32 full = base, empty = base + STAGES * 8, table = base - RESERVED + TABLE_AT, x = base - RESERVED + STAGES_AT;
    const int warp = warp_index(), lane = threadIdx.x % 32, g = lane / 4;
    const int rank = cluster_rank(), size = cluster_size(), cluster = blockIdx.x / size;
    // Those that run together read the same weights.
    const int blocks = (P.rows + ROWS - 1) / ROWS, first_tile = cluster / blocks * WARPS;
    int first_row = cluster % blocks * ROWS;
    const int begin = P.chunks * rank / size, chunks = P.chunks * (rank + 1) / size - begin;

    if (threadIdx.x == 0) {
        if (table % TABLE_AT) __trap();
        for (int i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(full + i * 8) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(empty + i * 8), "n"(WARPS) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int entry = warp; entry < 256; entry += WARPS)
        store_shared(table + (entry * 32 + lane) * 4, pack_bf16(NF4[entry >> 4], NF4[entry & 15]));
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;");

    const u64 policy = evict_first_policy();
    const i64 tile = min(first_tile + warp, P.tiles - 1);
    const uint4* w = P.weights + (tile * P.chunks + begin) * 32 + lane;
    const float2* s = P.scales + (tile * P.chunks + begin) * 8 + g;
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

    // A stage is filled anew when the second chunk after its own has been multiplied by the warp that sees to that.
    auto fetch = [&](int chunk) {
        const int stage = chunk % STAGES;
        if (chunk >= STAGES) await(empty + stage * 8, chunk / STAGES - 1 & 1);
        fetch_x(x + stage * STAGE_BYTES, map, (begin + chunk) * CHUNK, first_row, full + stage * 8);
    };
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (threadIdx.x == 0)
        for (int chunk = 0; chunk < min(AHEAD, chunks); chunk++) fetch(chunk);

    u32 place = table + lane * 4;
    asm volatile("" : "+r"(place) :: "memory");  // no lookup before the table is here
    u32 a[2][16];
    auto dequantize = [&](u32 (&to)[16], int d) {
        const Scale g0(scale[d].x), g8(scale[d].y);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 low = half ? bytes[d].y : bytes[d].x, high = half ? bytes[d].w : bytes[d].z;
            u32* own = to + half * 8;
            own[0] = g0.times(lookup<0>(place, low)), own[1] = g8.times(lookup<0>(place, high));
            own[2] = g0.times(lookup<1>(place, low)), own[3] = g8.times(lookup<1>(place, high));
            own[4] = g0.times(lookup<2>(place, low)), own[5] = g8.times(lookup<2>(place, high));
            own[6] = g0.times(lookup<3>(place, low)), own[7] = g8.times(lookup<3>(place, high));
        }
    };
    float sums[PARTS][EIGHTS / PARTS][4] = {};
    int stage = 0, before = -1, next = AHEAD;
    u32 parity = 0;
    auto multiply = [&](int d) {
        await(full + stage * 8, parity);
        const u32 from = 1u << 16 | (x + stage * STAGE_BYTES & 0x3ffff) >> 4;
        begin_wgmma();
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int part = 0; part < PARTS; part++) wgmma(sums[part], a[d % 2] + k * 4, from + part * 1024 + k * 2, true);
        commit_wgmma();
        await_wgmma<1>();
        if (lane == 0 && before >= 0) arrive(empty + before * 8);
        if (threadIdx.x == 0 && next < chunks) fetch(next);
        next++;
        before = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
    };
    for (; left >= DEPTH; left -= DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            dequantize(a[d % 2], d);
            load(d, DEPTH, d + DEPTH < left);
            multiply(d);
        }
        w += DEPTH * 32, s += DEPTH * 8;
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (d < left) {
            dequantize(a[d % 2], d);
            multiply(d);
        }
    await_wgmma<0>();
#pragma unroll
    for (int part = 0; part < PARTS; part++) pin(sums[part]);

    if (size > 1) {
        // Each CTA sums some of the rows, in its memory of x, once all are done with theirs.
        const int share = EIGHTS / size;
        const u32 own = x + warp * share * 512 + lane * 16;
        cluster_sync();
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
            store_cluster(map_cluster(own + (rank * WARPS * share + e % share) * 512, e / share),
                          sums[e * PARTS / EIGHTS][e % (EIGHTS / PARTS)]);
        cluster_sync();
#pragma unroll
        for (int e = 0; e < EIGHTS / 2; e++)
            if (e < share) {
                float4 sum = load_shared(own + e * 512);
                for (int other = 1; other < size; other++) {
                    const float4 v = load_shared(own + (other * WARPS * share + e) * 512);
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                auto& to = sums[e * PARTS / EIGHTS][e % (EIGHTS / PARTS)];
                to[0] = sum.x, to[1] = sum.y, to[2] = sum.z, to[3] = sum.w;
            }
        first_row += rank * share * 8;
    }
    const int eights = EIGHTS / size, rows = min(eights * 8, P.rows - first_row);
#if OUT == 32
    if (first_tile + warp < P.tiles) {
        float* y = reinterpret_cast<float*>(P.y) + i64(first_row) * P.stride + (first_tile + warp) * 16 + g;
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = e * 8 + lane % 4 * 2 + i % 2;
                if (row < rows) y[i64(row) * P.stride + i / 2 * 8] = sums[e * PARTS / EIGHTS][e % (EIGHTS / PARTS)][i];
            }
    }
#else
    // Outputs of a row are next to each other in y, but not in a lane: they change places where x was.
    sync<1, WARPS * 32>();
    const u32 own = x + warp / 4 * ROWS * 128;  // of four warps, 64 outputs of a row after the other, swizzled
    const u32 unit = warp % 4 * 2 + lane / 8 % 2, to = own + (lane / 16 * 8 + lane % 8) * 128 + (unit ^ lane % 8) * 16;
#pragma unroll
    for (int e = 0; e < EIGHTS; e += 2)
        if (e < eights) {
            const auto& low = sums[e * PARTS / EIGHTS][e % (EIGHTS / PARTS)];
            const auto& high = sums[e * PARTS / EIGHTS][e % (EIGHTS / PARTS) + 1];
            store_transposed(to + e * 1024, pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]),
                             pack_bf16(high[0], high[1]), pack_bf16(high[2], high[3]));
        }
    if (warp < 4) sync<2, 128>(); else sync<3, 128>();
    const int first = first_tile + warp / 4 * 4, at = threadIdx.x % 128, column = at % 8;
    u16* y = reinterpret_cast<u16*>(P.y) + i64(first_row) * P.stride + first * 16 + column * 8;
    if (first + column / 2 < P.tiles)
        for (int row = at / 8; row < rows; row += 16) {
            const float4 v = load_shared(own + row * 128 + (column ^ row % 8) * 16);
            *reinterpret_cast<float4*>(y + i64(row) * P.stride) = v;
        }
#endif
}
