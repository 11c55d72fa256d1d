// Products of 16 or 64 rows of a weight with rows of x, and how the weight's bits become numbers for them.
#pragma once

#include "nf4.cuh"
#include "product_group.cuh"

// The bytes I and I + 1 of a word, signed, as bf16: 128 or 256 is taken from 128 and the lower seven bits, which is exact.
// `exponents` is 0x43 in each byte.
template <int I>
__device__ __forceinline__ u32 signed_pair(u32 word, u32 exponents) {
    const u32 both = __byte_perm(word, exponents, I == 0 ? 0x4140 : 0x4342);
    u32 r;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(both & 0xff7fff7f), "r"(both & 0xff80ff80));
    return r;
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
