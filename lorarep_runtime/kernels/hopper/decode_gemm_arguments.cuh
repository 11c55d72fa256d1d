// The arguments of a decode GEMM and the division of its outputs among CTAs. decode_gemm.cu defines the words.
#pragma once

#include "ptx.cuh"

#define ENTRY_FIELDS 5
#define TILE 16   // outputs
#define CHUNK 64  // columns
#define ROWS (EIGHTS * 8)
#define THREADS (32 * (WARPS + SIDE))
#define UNIT (WGMMA ? 4 : TILES)  // tiles that are multiplied together or not at all
#define FETCH 8                   // chunks of NF4 that are prefetched to the L2 cache; DEPTH of them are in registers
#if KIND == 16
#define PLANES 4  // loads of 16 bytes that a lane needs for its numbers of a tile's chunk
#define STEP 8    // from one chunk to the next, in 16 bytes
#else
#define PLANES (KIND / 4)
#define STEP (32 * PLANES)
#endif

struct GemmArguments {        // a weight has the outputs of packed modules, which read the same x, one under the other
    const uint4* weights;     // NF4: (tiles, chunks, 32); int8: (tiles, chunks, 2, 32); bf16: (outputs, columns)
    const float* scales;      // NF4: (tiles, chunks, 8, 2), rows g and g + 8; int8: (outputs), the largest of each row
    const u16* x;             // (rows, columns) bf16
    u16* y;                   // (rows, outputs) bf16
    const u16* base_bias;     // (outputs) bf16, or null
    const float* shrunk;      // (rows, parts, modules, ranks) fp32: partial sums of A x
    const int* positions;     // (rows), -1 where a row passes through
    const i64* adapters;      // (rows) addresses of entry tables (positions, all modules, 5), or 0
    int rows, columns, tiles;
    int parts, ranks;         // parts and ranks of shrunk
    int first, modules;       // the first module's number in the entry tables; the number of modules
    int all_modules;          // modules in an entry table
    int ends[3];              // outputs up to and with each module
    int add;                  // whether y is added to (a residual) rather than written
    int cluster_tiles, rounds;  // tiles of a cluster, and the rounds that it takes them in
    int shrunk_ranks;           // ranks of a row's shrunk in shared memory at a time, of all modules together: at least 16 of each
    int stride;                 // stride of rows of sums: four times an odd number keeps a warp's sums in different banks
    int table_at, x_at, sums_at, added_at, entries_at;  // offsets in shared memory, in bytes
    int in_place;               // whether sums replace x in shared memory
};

struct Entry {  // of one row's adapter for one module; a rank of -1 marks a row that passes through
    const u16 *B, *c, *bias;
    int rank;
};
static_assert(sizeof(GemmArguments) == ARGUMENT_BYTES && sizeof(Entry) == ENTRY_BYTES, "decode_gemm.py's");

// A round of a cluster: tiles that its warps take at once.
struct Round {
    int tile, tiles;  // the first one, their number
    int share;        // outputs that each CTA finishes, at most; a multiple of eight
    // `left` rounds, this one included, share the tiles up to `end`.
    __device__ Round(const GemmArguments& args, int tile, int end, int left, int size) : tile(tile) {
        tiles = min((end - tile + left * UNIT - 1) / (left * UNIT) * UNIT, end - tile);
        share = (tiles * TILE + size * 8 - 1) / (size * 8) * 8;
    }
    __device__ int first_output(u32 rank) const { return tile * TILE + rank * share; }
    __device__ int outputs(u32 rank) const { return min(share, tiles * TILE - int(rank) * share); }
};

// The module of output n, the output's place there, and the module's number of outputs.
struct Output {
    int module, inner, out;
    __device__ Output(const GemmArguments& args, int n) {
        module = (n >= args.ends[0]) + (n >= args.ends[1]);
        const int start = module == 0 ? 0 : module == 1 ? args.ends[0] : args.ends[1];
        inner = n - start;
        out = (module == 0 ? args.ends[0] : module == 1 ? args.ends[1] : args.ends[2]) - start;
    }
};
