// y[t] = sum_k weights[t, k] pairs[t, k] over the experts that exist, summed in float32 in the order of k: the end of a
// mixture of experts, in one pass over the pairs. A module of its own, without common.cu.
//
// Y_TYPE, W_TYPE    of pairs and y, of the weights: 0 float32, 1 float16, 2 bfloat16
// COUNT             outputs of a thread: 1, or 16 bytes of them, of rows that are whole pieces at multiples of 16

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct Params {
  const void* pairs;    // [tokens, choices, out]
  const void* weights;  // [tokens, choices]
  const i64* ids;       // [tokens, choices]; an expert exists from 0 to experts - 1
  void* y;              // [tokens, out]
  int choices, out, experts;
};

template <int TYPE>
__device__ __forceinline__ float value(const void* from, i64 i) {
  if (TYPE == 0) return ((const float*)from)[i];
  u16 bits = ((const u16*)from)[i];
  float f;
  if (TYPE == 2) return __uint_as_float((u32)bits << 16);
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
__device__ __forceinline__ void store(void* to, i64 i, float f) {
  u16 bits;
  if (Y_TYPE == 0) {
    ((float*)to)[i] = f;
    return;
  }
  if (Y_TYPE == 1)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  ((u16*)to)[i] = bits;
}

static constexpr bool WIDE = COUNT > 1;

// A token for each blockIdx.x.
extern "C" __global__ void __launch_bounds__(128) tqw_combine(const __grid_constant__ Params p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
  int first = (blockIdx.y * 128 + threadIdx.x) * COUNT;
  if (first >= p.out) return;
  i64 token = blockIdx.x;
  float sum[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; i++) sum[i] = 0.f;
#pragma unroll 8
  for (int k = 0; k < p.choices; k++) {
    i64 pair = token * p.choices + k, expert = p.ids[pair];
    float weight = value<W_TYPE>(p.weights, pair);
    __align__(16) u16 piece[8];
    const u16* from = (const u16*)p.pairs + (pair * p.out + first) * (Y_TYPE == 0 ? 2 : 1);
    if (WIDE) *(uint4*)piece = *(const uint4*)from;
    if (expert < 0 || expert >= p.experts) continue;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum[i] = fmaf(weight, WIDE ? value<Y_TYPE>(piece, i) : value<Y_TYPE>(from, i), sum[i]);
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) store(p.y, token * p.out + first + i, sum[i]);
}
