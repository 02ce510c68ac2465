// What the modules have in common: parameters, the division of inputs into tiles, instructions.
//
//     y = T(x) V^T + b for packed codes: T(x) = H (a * x), V[n,k] = weight_scale[n, k / G] * level[code[n,k]]
//
// Compiled at run time by NVRTC without any header, one module for each set of the macros (cuda_variant.py sets them): this file,
// codes.cu and inputs.cu, then those of decode.cu, dense.cu, middle.cu or prompt.cu.
//
// BITS       widths of the passes, e.g. 4,4          PASSES    how many
// TILE       32 | 64 | 128                           BLOCK     rotation block 32 | 64 | 128
// ROTATE     0 none, 1 Hadamard                      SCALED    0: a = 1
// X_TYPE     of x and y: 0 float32, 1 float16, 2 bfloat16
// IN_PADDED, GROUP   padded number of inputs, inputs of one weight scale
// CLUSTER, SPLIT     CTAs of a cluster: 1, 2, 4; as many, which share the inputs, or 1: all have all (1, 1 before sm_90)
// EXPERTS            1: stacked weights, row i of y is a token by expert ids[i]: decode takes one row for each
//                    blockIdx.y, middle.cu blocks of rows that have the same expert

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Params {
  const void* x;        // [tokens, in], rows x_stride elements apart
  const u8* channel;    // [in] e5m2
  const void* bias;     // [out] in the type of x, or null
  void* y;              // [tokens, out]
  const u8* packed[4];  // [out, in_padded * bits / 8] for each pass
  const u16* scale[4];  // fp16 [out, groups]
  u8* planes;           // T(x), made by a kernel before this one
  float* plane_scale;   // its scales
  const i64* ids;       // rows to read instead of 0, 1, ... (dequantize)
  i64 x_stride;
  i64 first_row;        // dequantize, PROMPT: first row of the slice
  int tokens, out, in, vectors, batch;
  int experts, choices;  // EXPERTS: weights stacked in `packed`, rows of y for each row of x
  int arrivals;          // APART, PROMPT: counters in `arrived`
  int* arrived;          // for each tile, how many CTAs have left their sums; PROMPT: strips of V, asked for and decoded
  float4* parts;         // these sums
  u8* rows;              // PROMPT: V of a slice of rows
  float* row_scale;      // [out] the largest weight scale of each row
  i64 slice;             // rows of the slice
#if EXPERTS && defined(COLUMNS)
  int blocks;   // places for blocks of at most COLUMNS pairs (token, expert) of one expert
  int2* block;  // [blocks] expert and number of pairs, 0 where there is no block
  int* pair;    // [blocks, COLUMNS] the pairs of a block
  int* column;  // [pairs] where among these the pair stands, -1: its expert does not exist
#endif
};

static constexpr int WIDTHS[PASSES] = {BITS};
__host__ __device__ constexpr bool at_most(int bits) {
  for (int width : WIDTHS)
    if (width > bits) return false;
  return true;
}
static constexpr int LANE = TILE / 4;    // codes of one lane in one tile and row
static constexpr int STEPS = TILE / 32;  // mma steps of one tile
// Of each eight inputs T(x) in 8 bits has the even ones first: in this order codes of 2 and 3 bits become levels.
static constexpr bool EVENS_FIRST = at_most(3);
static constexpr int SUB = GROUP < TILE ? GROUP : TILE, SUBS = TILE / SUB;  // inputs of a tile with one weight scale
static_assert(SUBS == 1 || TILE == 128, "a tile is one group, a part of one, or two or four groups");
static constexpr int TILES = IN_PADDED / TILE, GROUPS = IN_PADDED / GROUP;

// --------------------------------------------------------------------------------------------------- small instructions

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ u16 float_to_bfloat(float f) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
// An input, output or bias of 16 bits.
__device__ __forceinline__ float value_16(u16 bits) {
  return X_TYPE == 1 ? half_to_float(bits) : __uint_as_float((u32)bits << 16);
}
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}
// a & mask | bits in one instruction: at most one of its constants can be immediate, so `bits` is a register.
__device__ __forceinline__ u32 mask_or(u32 a, u32 mask, u32 bits) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}
// (a | b) & mask, likewise.
__device__ __forceinline__ u32 or_mask(u32 a, u32 b, u32 mask) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xA8;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Programmatic dependent launch: weights are constants, so they are fetched while the kernel before still runs.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In this order the kernel after the next takes no place that the next needs: it counts where every multiprocessor has
// one CTA (decode). Kernels that only prepare x for the next one let it in first.
__device__ __forceinline__ void take_over() {
  wait_for_previous_kernel();
  allow_next_kernel();
}
static constexpr int MAGIC = 0x4B400000;  // the bits of 1.5 * 2^23 as a float: MAGIC + n are those of 1.5 * 2^23 + n

// --------------------------------------------------------------------------------------------------------------- memory

template <int BYTES>
__device__ __forceinline__ void read_words(u32* words, const u8* from) {
  if constexpr (BYTES >= 16) {
    for (int i = 0; i < BYTES / 16; i++) {
      uint4 v = ((const uint4*)from)[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  } else if constexpr (BYTES == 8) {
    uint2 v = *(const uint2*)from;
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (BYTES == 4) {
    words[0] = *(const u32*)from;
  } else if constexpr (BYTES == 2) {
    words[0] = *(const u16*)from;
  } else {
    words[0] = *from;
  }
}

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
// Without waiting for the writes before: others learn only that this CTA has come so far.
__device__ __forceinline__ void cluster_signal() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// The same place in the shared memory of another CTA of the cluster.
__device__ __forceinline__ u32 address_of_rank(u32 address, int rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
// The barrier expects the bytes already.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
#if CLUSTER > SPLIT
// To the same place of every CTA of the cluster, whose barriers are in the same place, too.
__device__ __forceinline__ void copy_bulk_to_all(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1))
      : "memory");
}
#endif
#endif

// -------------------------------------------------------------------------------------------------------------- outputs

__device__ __forceinline__ u32 pack_pair(float low, float high) {
  u32 d;
#if X_TYPE == 1
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
  return d;
}

__device__ __forceinline__ void store_output(const Params& p, int token, int row, float value) {
  i64 index = (i64)token * p.out + row;
#if X_TYPE == 0
  if (p.bias) value += ((const float*)p.bias)[row];
  ((float*)p.y)[index] = value;
#elif X_TYPE == 1
  if (p.bias) value += value_16(((const u16*)p.bias)[row]);
  ((u16*)p.y)[index] = float_to_half(value);
#else
  if (p.bias) value += value_16(((const u16*)p.bias)[row]);
  ((u16*)p.y)[index] = float_to_bfloat(value);
#endif
}

#if EXPERTS
// The parameters of blockIdx.y: those of one token and one expert, or (middle.cu) with the weights of a block's expert.
__device__ __forceinline__ Params of_expert(const Params& all) {
  constexpr int SIZE = X_TYPE == 0 ? 4 : 2;
  Params p = all;
#ifdef COLUMNS
  i64 pair = 0, rows = (i64)all.block[blockIdx.y].x * all.out;
#else
  i64 pair = blockIdx.y, expert = min(max(all.ids[pair], (i64)0), (i64)all.experts - 1), rows = expert * all.out;
#endif
#pragma unroll
  for (int i = 0; i < PASSES; i++) {
    p.packed[i] = all.packed[i] + rows * (IN_PADDED / 8 * WIDTHS[i]);
    p.scale[i] = all.scale[i] + rows * GROUPS;
  }
  p.x = (const u8*)all.x + pair / all.choices * all.x_stride * SIZE;
  p.y = (u8*)all.y + pair * all.out * SIZE;
  if (all.bias) p.bias = (const u8*)all.bias + rows * SIZE;
  return p;
}
#endif
