// The dequantization of an int8 weight. int8.py defines the order of its numbers.
#include "ptx.cuh"

#define CHUNK 64  // columns

// Writes W (outputs, columns) in bf16. Each number is multiplied by its row's scale in fp32 and rounded once. Without scales,
// the int8 numbers themselves are written, which bf16 holds exactly. A warp has one chunk of a tile, a unit.
extern "C" __global__ void int8_dequantize(const uint4* weights, const float* scales, u16* out, int columns, i64 units) {
    const i64 unit = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (unit >= units) return;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, chunks = columns / CHUNK;
    const i64 tile = unit / chunks, chunk = unit % chunks;
    uint4 both[2];
#pragma unroll
    for (int half = 0; half < 2; half++) load_once(both[half], weights + (unit * 2 + half) * 32 + lane, true, evict_first_policy());
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const i64 row = tile * 16 + g + half * 8;
        const float by = scales ? scales[row] * (1.0f / 127) : 1;
        u32 words[4] = {both[half].x, both[half].y, both[half].z, both[half].w};
        exchange(words, t);
        uint4* to = reinterpret_cast<uint4*>(out + row * columns + chunk * CHUNK + t * 16);
#pragma unroll
        for (int eight = 0; eight < 2; eight++) {
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int low = int(words[j] << 24 - eight * 16) >> 24, high = int(words[j] << 16 - eight * 16) >> 24;
                pairs[j] = pack_bf16(float(low) * by, float(high) * by);
            }
            to[eight] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}
