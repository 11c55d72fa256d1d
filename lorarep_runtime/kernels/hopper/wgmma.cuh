// Hopper's wgmma: four warps multiply 64 rows of a weight, in registers, by rows of x, in shared memory.
// Source: https://docs.nvidia.com/cuda/parallel-thread-execution, "Asynchronous warpgroup level matrix instructions".
#pragma once

#include "ptx.cuh"

#define REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGISTERS_16 REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_32 REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_64                                                                                  \
    REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55" \
                 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define OPERANDS_4(e) "+f"(d[e][0]), "+f"(d[e][1]), "+f"(d[e][2]), "+f"(d[e][3])
#define OPERANDS_8(e) OPERANDS_4(e), OPERANDS_4(e + 1)
#define OPERANDS_16(e) OPERANDS_8(e), OPERANDS_8(e + 2)
#define OPERANDS_32(e) OPERANDS_16(e), OPERANDS_16(e + 4)
#define OPERANDS_64(e) OPERANDS_32(e), OPERANDS_32(e + 8)
// wgmma for n rows of x. `count` is the number of registers of d; a, x and p are the numbers of the operands behind them.
#define MULTIPLY(n, count, a, x, p)                                                                     \
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %" #p ", 0;"                                        \
                 "  wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" REGISTERS_##count "}, {" a "}, %" #x \
                 ", p, 1, 1, 0; }"                                                                   \
                 : OPERANDS_##count(0) : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(rows), "r"(u32(add)))

// Begins d = w xᵀ, or d += w xᵀ with `add`, for d (64, 8 N) fp32, w (64, 16) bf16 and x (8 N, 16) bf16. Four warps hold d and
// w. `x_at` is the lower word of x's matrix descriptor. The product is complete behind await_wgmma().
template <int N>
__device__ __forceinline__ void wgmma(float (&d)[N][4], const u32* w, u32 x_at, bool add) {
    // PTX's matrix descriptor of x: groups of eight rows are 1024 bytes apart, in the 128-byte swizzle.
    const u64 rows = 1ull << 62 | 64ull << 32 | x_at;
    if constexpr (N == 2)
        MULTIPLY(16, 8, "%8,%9,%10,%11", 12, 13);
    else if constexpr (N == 4)
        MULTIPLY(32, 16, "%16,%17,%18,%19", 20, 21);
    else if constexpr (N == 8)
        MULTIPLY(64, 32, "%32,%33,%34,%35", 36, 37);
    else
        MULTIPLY(128, 64, "%64,%65,%66,%67", 68, 69);
}

// Keeps the compiler from reading d before await_wgmma().
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
    for (int e = 0; e < N; e++)
        asm volatile("" : "+f"(d[e][0]), "+f"(d[e][1]), "+f"(d[e][2]), "+f"(d[e][3]) :: "memory");
}

// Orders accesses of registers and shared memory before the products that follow.
__device__ __forceinline__ void begin_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products, for which await_wgmma() waits as a whole.
__device__ __forceinline__ void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most LEFT groups of products are incomplete.
template <int LEFT>
__device__ __forceinline__ void await_wgmma() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}
