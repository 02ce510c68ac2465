// Hopper's product of a warpgroup, for middle.cu and prompt.cu. A from registers, B in shared memory, K-major in rows of
// 128 bytes. After codes.cu and inputs.cu.
//
// COARSE                1: int8 with int32 sums, else fp16 with float32 sums
// WGMMA, WGMMA_SUMS     the instruction and its accumulator operands
// PROMPT                1: both operands in shared memory (prompt.cu)
// EVERY_LANE            1: for racecheck, which does not follow that a warp's own order puts all lanes' reads before the
//                       arrival of one of them

#ifndef EVERY_LANE
#define EVERY_LANE 0
#endif

static constexpr int STAGE_BYTES = COLUMNS * (COARSE ? TILE : 2 * TILE);  // of T(x): a tile of COLUMNS tokens

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// K-major B with rows of 128 bytes, 128-byte swizzle: groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ void fence_sums() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#if COARSE
typedef int Sum;
#else
typedef float Sum;
#endif
#if APART || PROMPT
// Counters that the product starts from, by the kernel before it.
__device__ __forceinline__ void clear_counts(const Params& p, int first, int step) {
  for (int i = first; i < p.arrivals; i += step) p.arrived[i] = 0;
}
#endif

#if PROMPT
// d = a b, or d += a b, later; both in shared memory.
__device__ __forceinline__ void multiply_shared(Sum* d, u64 a, u64 b, bool add) {
  asm volatile(WGMMA : WGMMA_SUMS : "l"(a), "l"(b), "r"((int)add));
}
#else
// d += a b, later.
__device__ __forceinline__ void multiply_async(Sum* d, const u32* a, u64 b) {
  asm volatile(WGMMA : WGMMA_SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}
#endif
