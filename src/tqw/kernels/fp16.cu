// T(x) and V in fp16, for the product of middle.cu. After wgmma.cu.
//
// T(x) is fp16 over one power of two for each token; V is rounded to fp16: levels are exact, the product with
// weight_scale rounds once for each pass; wgmma sums in float32.
//
// In memory T(x) has COLUMNS rows of 128 bytes for each half of a tile, chunks of 16 swizzled. Byte 16 c + 4 t + j of half w
// is of inputs 32 t + 16 w + 8 (c / 4) + 2 (c % 4) and the next; PAIRS: 32 t + 16 w + 8 (c / 4) + c % 4 and the one 4
// further.
//
// SPREAD    CTAs of a cluster that write T(x) of one token: 1, 2, 4, 8

static constexpr bool PAIRS = PASSES == 1 && (WIDTHS[0] == 5 || WIDTHS[0] == 6);  // as `levels_of_pairs` has them

// Eight inputs of a token from k on. Lane t of a quad owns inputs [32 t, 32 t + 32) of a tile in the product.
__device__ __forceinline__ void spread_store(const Params& p, int token, int k, const float* v) {
  int t = k % TILE / 32, word = k % 32 / 8, row = token & 7;
  u8* to = p.planes + ((i64)(token / COLUMNS) * TILES + k / TILE) * STAGE_BYTES + (word / 2) * (COLUMNS * 128) + token % COLUMNS * 128;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int one = PAIRS ? i : 2 * i, other = PAIRS ? i + 4 : 2 * i + 1;
    *(u32*)(to + (4 * (word % 2) + i ^ row) * 16 + t * 4) = float_to_half(v[one]) | (u32)float_to_half(v[other]) << 16;
  }
}

// T(x) of one token: fp16, in the order of the product, over 2^e; plane_scale[column] = 2^e. x is read once. A token is
// its own column; with EXPERTS each pair has one, and the outputs of an expert that does not exist become 0.
extern "C" __global__ void __launch_bounds__(256) tqw_spread(const __grid_constant__ Params p) {
#if SPREAD > 1
  __shared__ float most_of_cta[SPREAD];
#endif
  constexpr int STRIDE = 2048 * SPREAD, ROUNDS = (IN_PADDED + STRIDE - 1) / STRIDE;
  constexpr int KEPT = ROUNDS < 8 ? ROUNDS : 8;  // the rest is read again
  int rank = blockIdx.x % SPREAD, lane = threadIdx.x & 31;
#if EXPERTS
  int token = blockIdx.x / p.choices;
#else
  int token = blockIdx.x / SPREAD, column = token;
#endif
  int first = rank * 2048 + threadIdx.x * 8;
  allow_next_kernel();
#if SPREAD > 1
  cluster_signal();  // all have begun before one writes to another
#endif
  float a[KEPT][8], v[KEPT][8], most = 0.f;
#if SCALED
#pragma unroll
  for (int r = 0; r < KEPT; r++) channel_scales(p, r * STRIDE + first, a[r]);
#endif
  wait_for_previous_kernel();
#if EXPERTS
  int column = p.column[blockIdx.x];
  if (column < 0) return clear_outputs(p, blockIdx.x);
#endif
#pragma unroll
  for (int r = 0; r < KEPT; r++) {
    load_inputs(p, token * p.x_stride, r * STRIDE + first, v[r]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (SCALED) v[r][i] *= a[r][i];
      most = max_or_nan(most, fabsf(v[r][i]));
    }
  }
#pragma unroll 1
  for (int r = KEPT; r < ROUNDS; r++) {
    float w[8];
    scaled_inputs(p, token, r * STRIDE + first, w);
#pragma unroll
    for (int i = 0; i < 8; i++) most = max_or_nan(most, fabsf(w[i]));
  }
  most = most_of_warps<8>(most);
#if SPREAD > 1
  cluster_wait();
  if (threadIdx.x < SPREAD)
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_of_rank(shared_address(most_of_cta + rank), threadIdx.x)), "f"(most)
                 : "memory");
  __syncwarp();
  cluster_arrive();
  cluster_wait();
#pragma unroll
  for (int r = 0; r < SPREAD; r++) most = max_or_nan(most, most_of_cta[r]);
#endif
  // |T(x)| <= sqrt(128) most < 23 * 2^e: below 2^15 after the division
  float scale = most > 0.f ? __uint_as_float(__float_as_uint(most) & 0x7F800000u) * 0x1p-10f : 1.f;
  if (!(most < 3e38f)) scale = most - most;  // NaN for NaN and Inf: every output of the token is NaN
  if (scale < 0x1p-120f) scale = 0x1p-120f;
  float inverse = 1.f / scale;
  if (rank == 0 && threadIdx.x == 0) p.plane_scale[column] = scale;
  auto store = [&](float (&values)[8], int k) {
#if ROTATE
    hadamard(values, lane);
#endif
    if (k >= IN_PADDED) return;
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] *= inverse;
    spread_store(p, column, k, values);
  };
#pragma unroll
  for (int r = 0; r < KEPT; r++) store(v[r], r * STRIDE + first);
#pragma unroll 1
  for (int r = KEPT; r < ROUNDS; r++) {
    float w[8];
    scaled_inputs(p, token, r * STRIDE + first, w);
    store(w, r * STRIDE + first);
  }
}

__device__ __forceinline__ u32 half2_multiply(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Four biased levels times a scale (twice in one register): two registers of fp16 pairs.
__device__ __forceinline__ void to_half(u32 biased, u32 scale, u32& low, u32& high) {
  low = half2_multiply(half2_of_biased(biased, 0), scale);
  high = half2_multiply(half2_of_biased(biased, 1), scale);
}
