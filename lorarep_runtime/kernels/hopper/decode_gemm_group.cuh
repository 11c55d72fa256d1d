// What the product of a group of modules is asked for, and how a cluster goes about it. product.cu says what the words mean.
#pragma once

#include "ptx.cuh"

#define ENTRY 5
#define CHUNK 64
#define ROWS (EIGHTS * 8)
#define THREADS (32 * (WARPS + SIDE))
#define UNIT (WGMMA ? 4 : TILES)  // tiles that are multiplied or not
#define FETCH 8                   // chunks of NF4 on their way from memory to the L2 cache; from there it is DEPTH
#if KIND == 16
#define PLANES 4
#define STEP 8  // from one chunk to the next, in 16 bytes
#else
#define PLANES (KIND / 4)
#define STEP (32 * PLANES)
#endif

struct Group {                // modules that read the same x, their weights one under the other
    const uint4* weights;     // NF4: (tiles, chunks, 32); int8: (tiles, chunks, 2, 32); bf16: (outputs, columns)
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
    int low_ranks;              // of a row in shared memory at a time, over all its modules; 16 of each at least
    int stride;                 // of a row of sums; four times an odd number, so that a warp's sums are in different banks
    int table_at, x_at, sums_at, added_at, entries_at;  // in shared memory, bytes
    int in_place;               // whether sums are where x was
};

struct Entry {  // of one row's adapter for one module; a rank of -1 is a row that passes through
    const u16 *B, *c, *bias;
    int rank;
};
static_assert(sizeof(Group) == GROUP_BYTES && sizeof(Entry) == ENTRY_BYTES, "product.py's");

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
