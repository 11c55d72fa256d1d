// The A fragments of tensor cores, bf16, from the bits of a weight.
#pragma once

#include "decode_gemm_cta.cuh"
#include "nf4.cuh"

// The bytes I and I + 1 of a word, signed, as bf16: 128 or 256 is taken from 128 and the lower seven bits, which is exact.
// `exponents` is 0x43 in each byte.
template <int I>
__device__ __forceinline__ u32 signed_pair(u32 word, u32 exponents) {
    const u32 both = __byte_perm(word, exponents, I == 0 ? 0x4140 : 0x4342);
    return sub_bf16x2(both & 0xff7fff7f, both & 0xff80ff80);
}

// Fills the table of pairs, (256 bytes, 32 lanes): each lane has its own copy in its own bank.
__device__ __forceinline__ void fill_table(const GemmArguments& args, const Cta& cta, unsigned char* shared) {
    const int warp = cta.warp, lane = cta.lane;
    if (cta.base + args.table_at & 0x7fff) __trap();  // lookup() ors an index into these bits
    u32* table = reinterpret_cast<u32*>(shared + args.table_at);
    for (int first = warp * 32; first < 256; first += WARPS * 32) {
        const u32 own = pack_bf16(NF4[first + lane >> 4], NF4[lane & 15]);
        for (int i = 0; i < 32; i++) table[(first + i) * 32 + lane] = __shfl_sync(~0u, own, i);
    }
}

// The A fragments of a weight of KIND bits, made in registers.
struct Fragments {
    u32 constant;  // NF4: the lane's place in the table; int8: the exponents of signed_pair()

    __device__ __forceinline__ Fragments(const GemmArguments& args, const Cta& cta) {
#if KIND == 4
        constant = cta.base + args.table_at + cta.lane * 4;
        hide(constant);  // lookups must not precede the table
#elif KIND == 8
        // The compiler must not know this number. An instruction takes one constant operand, so the compiler would load the
        // selectors of permutations each time.
        constant = 0x43434343 + (args.rows >> 16);
#endif
    }

    // Makes the A operand of 16 outputs and half a chunk: eight registers of two bf16 numbers.
    __device__ __forceinline__ void make(u32 (&a)[8], const uint4 (&v)[PLANES], int half) const {
#if KIND == 4
        const u32 g0 = half ? v[0].y : v[0].x, g8 = half ? v[0].w : v[0].z;
        a[0] = lookup<0>(constant, g0), a[1] = lookup<0>(constant, g8);
        a[2] = lookup<1>(constant, g0), a[3] = lookup<1>(constant, g8);
        a[4] = lookup<2>(constant, g0), a[5] = lookup<2>(constant, g8);
        a[6] = lookup<3>(constant, g0), a[7] = lookup<3>(constant, g8);
#elif KIND == 8
        const u32 g0 = half ? v[0].z : v[0].x, g8 = half ? v[1].z : v[1].x;
        const u32 h0 = half ? v[0].w : v[0].y, h8 = half ? v[1].w : v[1].y;
        a[0] = signed_pair<0>(g0, constant), a[1] = signed_pair<0>(g8, constant);
        a[2] = signed_pair<2>(g0, constant), a[3] = signed_pair<2>(g8, constant);
        a[4] = signed_pair<0>(h0, constant), a[5] = signed_pair<0>(h8, constant);
        a[6] = signed_pair<2>(h0, constant), a[7] = signed_pair<2>(h8, constant);
#else
        const uint4 g0 = v[half], g8 = v[2 + half];
        a[0] = g0.x, a[1] = g8.x, a[2] = g0.y, a[3] = g8.y, a[4] = g0.z, a[5] = g8.z, a[6] = g0.w, a[7] = g8.w;
#endif
    }
};
