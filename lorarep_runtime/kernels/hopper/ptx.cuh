// PTX instructions that CUDA C++ has no functions for: https://docs.nvidia.com/cuda/parallel-thread-execution.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

// Rounds two fp32 numbers to bf16 and packs them into one word.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Widens four bf16 numbers to fp32.
__device__ __forceinline__ void widen(float (&v)[4], uint2 bits) {
    v[0] = __uint_as_float(bits.x << 16), v[1] = __uint_as_float(bits.x & 0xffff0000);
    v[2] = __uint_as_float(bits.y << 16), v[3] = __uint_as_float(bits.y & 0xffff0000);
}

// Loads four bf16 numbers from an address that is a multiple of 8 bytes.
__device__ __forceinline__ uint2 load4(const u16* p) { return *reinterpret_cast<const uint2*>(p); }

// Transposes words among every four lanes: words[j] of lane t becomes words[t] of lane j.
__device__ __forceinline__ void exchange(u32 (&words)[4], int t) {
    auto order = [](u32& a, u32& b, bool change) {
        const u32 first = change ? b : a;
        b = change ? a : b, a = first;
    };
    auto by_distance = [&] {  // reorders words so that words[j] is for lane t ^ j; a second call undoes it
        order(words[0], words[1], t & 1), order(words[2], words[3], t & 1);
        order(words[0], words[2], t & 2), order(words[1], words[3], t & 2);
    };
    by_distance();
#pragma unroll
    for (int other = 1; other < 4; other++) words[other] = __shfl_xor_sync(~0u, words[other], other);
    by_distance();
}

// The L2 policy of weights: their cache lines are evicted first, since the kernels read them once. Activations are read again.
__device__ __forceinline__ u64 evict_first_policy() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Loads 16 bytes that are read once, past the L1 cache. Registers keep their values if `wanted` is false. With a plain
// condition, the compiler loads into other registers and waits to copy them.
__device__ __forceinline__ void load_once(uint4& v, const uint4* p, bool wanted, u64 policy) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0;"
                 "  @p ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4], %6; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"(u32(wanted)), "l"(policy));
}

// Loads two fp32 numbers that are read once, past the L1 cache. Registers keep their values if `wanted` is false.
__device__ __forceinline__ void load_once(float2& v, const float2* p, bool wanted, u64 policy) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0;"
                 "  @p ld.global.nc.L1::no_allocate.L2::cache_hint.v2.f32 {%0,%1}, [%2], %4; }"
                 : "+f"(v.x), "+f"(v.y) : "l"(p), "r"(u32(wanted)), "l"(policy));
}

// Prefetches the cache line of an address to the L2 cache if `wanted`.
__device__ __forceinline__ void prefetch_L2(const void* p, bool wanted) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p prefetch.global.L2 [%0]; }" :: "l"(p), "r"(u32(wanted)));
}

// Loads 16 bytes past the L1 cache, which has a few KiB: shared memory takes the rest.
__device__ __forceinline__ void load_past_L1(u32 (&v)[4], const u16* p) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "l"(p));
}

// The cluster address of the same shared memory in the CTA `rank` of the cluster.
__device__ __forceinline__ u32 map_cluster(u32 address, u32 rank) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}

// Stores an fp32 number at a cluster address (map_cluster).
__device__ __forceinline__ void store_cluster(u32 address, float v) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(address), "f"(v) : "memory");
}

// Initializes an mbarrier in shared memory: a phase takes `count` arrivals.
__device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

// Makes the initialization of mbarriers visible to the whole cluster.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives at the cluster's barrier; the threads' writes need not be visible behind it.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

// Arrives at the cluster's barrier; writes that precede it are visible behind cluster_wait().
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

// Waits until all threads of the cluster have arrived at its barrier.
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Programmatic dependent launch: allows the next kernel to begin.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// Programmatic dependent launch: waits until the previous kernel has ended and its memory is visible.
__device__ __forceinline__ void await_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Arrives at the mbarrier of the CTA `rank` of the cluster. Threads that wait there see the writes that precede an arrival.
__device__ __forceinline__ void arrive(u32 barrier, u32 rank) {
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %0, %1;"
                 "  mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a]; }" :: "r"(barrier), "r"(rank) : "memory");
}

// Arrives at an mbarrier of the CTA itself.
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Waits until an mbarrier's phase of this parity is complete.
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
    u32 done;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;"
                     "  selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    while (!done);
}

// Waits until an mbarrier's phase of this parity is complete, where all that arrive are of the CTA itself, TMA among them.
__device__ __forceinline__ void await_own(u32 barrier, u32 parity) {
    u32 done;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
                     "  selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    while (!done);
}

// Waits at the named barrier WHICH for COUNT threads of the CTA.
template <int WHICH, int COUNT>
__device__ __forceinline__ void sync() {
    asm volatile("bar.sync %0, %1;" :: "n"(WHICH), "n"(COUNT) : "memory");
}

// Waits at the named barrier `which` for COUNT threads of the CTA.
template <int COUNT>
__device__ __forceinline__ void sync(int which) {
    asm volatile("bar.sync %0, %1;" :: "r"(which), "n"(COUNT) : "memory");
}

// Stores a word at an address of shared memory.
__device__ __forceinline__ void store_shared(u32 address, u32 v) {
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(v) : "memory");
}

// Begins an asynchronous copy of 16 bytes from global to shared memory. If `bytes` is 0, it writes zeros.
__device__ __forceinline__ void copy16(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

// Waits for all copies that the thread began by copy16().
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Makes the threads' writes to shared memory visible to TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Loads the words at an address of shared memory and 16 bytes behind it.
__device__ __forceinline__ void load_shared(u32& first, u32& second, u32 address) {
    asm volatile("ld.shared.u32 %0, [%2]; ld.shared.u32 %1, [%2 + 16];" : "=r"(first), "=r"(second) : "r"(address));
}

// Hides the value of v from the compiler, and keeps its uses behind the memory accesses that precede the call.
__device__ __forceinline__ void hide(u32& v) { asm volatile("" : "+r"(v) :: "memory"); }

// a - b for pairs of bf16 numbers.
__device__ __forceinline__ u32 sub_bf16x2(u32 a, u32 b) {
    u32 r;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// Adds A (16, 16) times B (16, 8), bf16, to d (16, 8), fp32, in the registers of a warp.
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Loads the B fragments of two mma: 8 rows times 32 columns of x. Lane l gives the address of 16 bytes of row l % 8.
__device__ __forceinline__ void load_matrices(u32 (&b)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address));
}

// The warp's number in its CTA. The shuffle shows the compiler that all lanes have the same number.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// The CTA's number in its cluster.
__device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

// The number of CTAs in the cluster.
__device__ __forceinline__ u32 cluster_size() {
    u32 r;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
    return r;
}

// A pair of bf16 numbers times `high` + `low`, also pairs; the sum of both products is rounded to bf16 once.
__device__ __forceinline__ u32 mul_bf16x2(u32 pair, u32 high, u32 low) {
    u32 r;
    asm("{ .reg .b32 t; mul.rn.bf16x2 t, %1, %3; fma.rn.bf16x2 %0, %1, %2, t; }" : "=r"(r) : "r"(pair), "r"(high), "r"(low));
    return r;
}

// The driver's CUtensorMap: TMA's description of a matrix.
struct alignas(64) TensorMap { char opaque[128]; };

// Begins a copy by TMA of a box of a matrix to shared memory. The mbarrier's phase completes when BYTES bytes have arrived.
template <int BYTES>
__device__ __forceinline__ void fetch_tensor(u32 to, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "n"(BYTES) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// Loads four fp32 numbers from an address of shared memory.
__device__ __forceinline__ float4 load_shared(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}

// Stores four fp32 numbers at a cluster address (map_cluster).
__device__ __forceinline__ void store_cluster(u32 address, const float (&v)[4]) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

// Waits until all threads of the cluster have called it.
__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// Stores four matrices of 8 times 8 bf16 numbers, transposed. Lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Four warps keep COUNT registers for each of their threads, and leave the others to the CTA.
template <int COUNT>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }

// Four warps have COUNT registers for each of their threads, as soon as others have left them.
template <int COUNT>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }
