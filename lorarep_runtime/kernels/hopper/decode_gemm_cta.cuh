// A CTA of a decode GEMM: its place in the cluster, its shared memory and its barriers.
#pragma once

#include "decode_gemm_arguments.cuh"

// Named barriers, and the threads that meet there.
#define ALL_WARPS 0, THREADS
#define GEMM_WARPS 1, WARPS * 32
#define SIDE_WARPS 2, SIDE * 32

struct Cta {
    u32 rank, size;            // its number in the cluster, and the cluster's CTAs
    int warp, lane;            // the thread's warp and lane
    int first_tile, end_tile;  // the cluster's first tile, and the tile behind its last one
    u32 base;                  // address of shared memory
    float* sums;               // (CTAs, rows, stride): the sums that the cluster's CTAs leave here
    float* added;              // (rows, stride): the adapters' part of the outputs
    u32 full, empty, ready;    // mbarriers: sums have arrived; all CTAs have read theirs; the last shrunk is here
    int* taken;                // tasks of the side warps that have been taken
    Entry* entries;            // (rows, modules), the entry of each row for each module

    __device__ __forceinline__ Cta(const GemmArguments& args, unsigned char* shared) {
        rank = cluster_rank(), size = cluster_size();
        warp = warp_index(), lane = threadIdx.x % 32;
        first_tile = blockIdx.x / size * args.cluster_tiles, end_tile = min(first_tile + args.cluster_tiles, args.tiles);
        base = u32(__cvta_generic_to_shared(shared));
        sums = reinterpret_cast<float*>(shared + args.sums_at);
        added = reinterpret_cast<float*>(shared + args.added_at);
        full = base + args.entries_at, empty = full + 8, ready = full + 16;
        taken = reinterpret_cast<int*>(shared + args.entries_at + 24);
        entries = reinterpret_cast<Entry*>(shared + args.entries_at + BARRIER_BYTES);
    }

    // The other CTAs see the barriers after cluster_wait().
    __device__ __forceinline__ void init_barriers() const {
        if (threadIdx.x == 0) {
            init_barrier(full, WARPS * size);
            init_barrier(empty, size);
            init_barrier(ready, SIDE * 32);
            fence_barrier_init();
        }
        __syncwarp();
        cluster_arrive_relaxed();
    }
};
