// Kernels that read all of an NF4 weight: dequantization, and the squared norms of rows. nf4.py defines the tiles.
#include "nf4.cuh"

#define CHUNK 64  // columns that share a scale

// Writes W (outputs, columns) in bf16. Each number is code times scale in fp32, rounded once, as in bitsandbytes. A warp has
// one chunk of a tile, a unit; `units` is their number.
extern "C" __global__ void nf4_dequantize(const uint4* weights, const float2* scales, u16* out, int columns, i64 units) {
    const i64 unit = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (unit >= units) return;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, chunks = columns / CHUNK;
    const i64 tile = unit / chunks, chunk = unit % chunks;
    uint4 bytes;
    float2 scale;
    load_once(bytes, weights + unit * 32 + lane, true, evict_first_policy());
    load_once(scale, scales + unit * 8 + g, true, evict_first_policy());
    const float own = NF4[lane & 15];  // lanes exchange numbers, since constant memory serves one address at a time
    auto value = [&](u32 code) { return __shfl_sync(~0u, own, code); };
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 g0 = half ? bytes.z : bytes.x, g1 = half ? bytes.w : bytes.y;
        const float by = half ? scale.y : scale.x;
        // Lane t has the columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16. exchange() gives it all of the t-th 16.
        u32 codes[4] = {g0, g0 >> 16, g1, g1 >> 16};
        exchange(codes, t);
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

// Writes the sum of squares of each row of W, fp32 (outputs). A CTA has one tile, and each warp every eighth chunk of it.
extern "C" __global__ void nf4_squares(const uint4* weights, const float2* scales, float* out, int chunks) {
    __shared__ float parts[8][16];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
    const float own = NF4[lane & 15] * NF4[lane & 15];  // lanes exchange them: constant memory serves one address at a time
    float sums[2] = {};
    for (int chunk = warp; chunk < chunks; chunk += 8) {
        const i64 unit = i64(blockIdx.x) * chunks + chunk;
        uint4 bytes;
        float2 scale;
        load_once(bytes, weights + unit * 32 + lane, true, evict_first_policy());
        load_once(scale, scales + unit * 8 + g, true, evict_first_policy());
        const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
        for (int high = 0; high < 2; high++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 16; i++) sum += __shfl_sync(~0u, own, words[high * 2 + i / 8] >> i % 8 * 4 & 15);
            sums[high] += sum * (high ? scale.y * scale.y : scale.x * scale.x);
        }
    }
#pragma unroll
    for (int high = 0; high < 2; high++) {
        for (int other = 1; other < 4; other *= 2) sums[high] += __shfl_xor_sync(~0u, sums[high], other);
        if (lane % 4 == 0) parts[warp][g + 8 * high] = sums[high];
    }
    __syncthreads();
    if (threadIdx.x < 16) {
        float sum = 0;
        for (int i = 0; i < 8; i++) sum += parts[i][threadIdx.x];
        out[blockIdx.x * 16 + threadIdx.x] = sum;
    }
}
