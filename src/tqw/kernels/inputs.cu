// Inputs: a * x from memory, H, and the bytes of T(x). After common.cu.

struct Raw {  // eight inputs as they are in memory
  u32 words[X_TYPE == 0 ? 8 : 4];
};
__device__ __forceinline__ Raw load_raw(const Params& p, i64 row, int k) {  // 0 beyond the last
  Raw raw;
#if X_TYPE == 0
  const u32* x = (const u32*)p.x + row;
#else
  const u16* x = (const u16*)p.x + row;
#endif
  if (p.vectors && k + 8 <= p.in) {
    read_words<sizeof(Raw)>(raw.words, (const u8*)(x + k));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      u32 word = k + i < p.in ? x[k + i] : 0;
#if X_TYPE == 0
      raw.words[i] = word;
#else
      raw.words[i / 2] = i % 2 ? raw.words[i / 2] | word << 16 : word;
#endif
    }
  }
  return raw;
}
__device__ __forceinline__ void raw_values(const Raw& raw, float* v) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
#if X_TYPE == 0
    v[i] = __uint_as_float(raw.words[i]);
#elif X_TYPE == 1
    v[i] = half_to_float((u16)(raw.words[i / 2] >> (i % 2 * 16)));
#else
    v[i] = __uint_as_float(i % 2 ? raw.words[i / 2] & 0xFFFF0000u : raw.words[i / 2] << 16);
#endif
  }
}
__device__ __forceinline__ void load_inputs(const Params& p, i64 row, int k, float* v) { raw_values(load_raw(p, row, k), v); }

__device__ __forceinline__ uint2 channel_bytes(const Params& p, int k) {  // 0 beyond the last
  if (p.vectors && k + 8 <= p.in) return *(const uint2*)(p.channel + k);
  u32 words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (k + i < p.in) words[i / 4] |= (u32)p.channel[k + i] << (8 * (i % 4));
  return make_uint2(words[0], words[1]);
}
__device__ __forceinline__ void channel_values(uint2 bytes, float* a) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    u32 byte = (i < 4 ? bytes.x >> (8 * i) : bytes.y >> (8 * (i - 4))) & 0xFFu;
    a[i] = half_to_float((u16)(byte << 8));  // e5m2 is the upper byte of fp16
  }
}
__device__ __forceinline__ void channel_scales(const Params& p, int k, float* a) { channel_values(channel_bytes(p, k), a); }

static constexpr float NORM = BLOCK == 128 ? 0.08838834764831845f : BLOCK == 64 ? 0.125f : 0.17677669529663687f;

// The three butterfly stages of eight neighbours.
__device__ __forceinline__ void hadamard_of_eight(float* v) {
#pragma unroll
  for (int bit = 1; bit < 8; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (!(i & bit)) {
        float a = v[i], b = v[i | bit];
        v[i] = a + b, v[i | bit] = a - b;
      }
    }
  }
}
// H / NORM on eight neighbours a lane, the other stages across lanes.
__device__ __forceinline__ void hadamard_sums(float* v, int lane) {
  hadamard_of_eight(v);
#pragma unroll
  for (int bit = 1; bit < BLOCK / 8; bit *= 2) {
    float sign = lane & bit ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = fmaf(sign, v[i], __shfl_xor_sync(~0u, v[i], bit));
  }
}
__device__ __forceinline__ void hadamard(float* v, int lane) {
  hadamard_sums(v, lane);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= NORM;
}

// The largest of COUNT warps. Calls of a loop need memory in turns: warps still read when the first ones come again.
template <int COUNT>
__device__ __forceinline__ float most_of_warps(float most, int turn = 0) {
  __shared__ float memory[2][COUNT];
  float* most_of_warp = memory[turn];
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) most = max_or_nan(most, __shfl_xor_sync(~0u, most, bit));
  if (threadIdx.x % 32 == 0) most_of_warp[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < COUNT; w++) most = max_or_nan(most, most_of_warp[w]);
  return most;
}

// a * x of eight inputs.
__device__ __forceinline__ void scaled_values(const Raw& raw, uint2 channel, float (&v)[8]) {
  raw_values(raw, v);
#if SCALED
  float a[8];
  channel_values(channel, a);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] *= a[i];
#endif
}
__device__ __forceinline__ void scaled_inputs(const Params& p, int token, int k, uint2 channel, float (&v)[8]) {
  scaled_values(load_raw(p, token * p.x_stride, k), channel, v);
}
__device__ __forceinline__ void scaled_inputs(const Params& p, int token, int k, float (&v)[8]) {
  scaled_inputs(p, token, k, channel_bytes(p, k), v);
}

__device__ __forceinline__ u32 lower_bytes(const int* n) {
  return permute(permute(n[0], n[1], 0x0040), permute(n[2], n[3], 0x0040), 0x5410);
}
// Which four of eight come first (i = 0) or last.
template <typename T>
__device__ __forceinline__ void half_of_eight(const T* eight, int i, T* four) {
#pragma unroll
  for (int j = 0; j < 4; j++) four[j] = eight[EVENS_FIRST ? 2 * j + i : 4 * i + j];
}
