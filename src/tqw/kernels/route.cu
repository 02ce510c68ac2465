// The order of (token, expert) pairs for products of many pairs of an expert (middle.cu). Nothing on the host depends on the
// ids. After wgmma.cu.

// Brings the pairs of each expert together, in their order, in whole blocks of COLUMNS. One cluster: each warp counts the
// experts of its share of the pairs, then places it behind the shares of the warps before it.
extern "C" __global__ void __launch_bounds__(1024) tqw_route(const __grid_constant__ Params p) {
  extern __shared__ int counts[];  // [32, experts] of each warp, then the pairs before; the next four of each expert
  int rank = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x & 31, experts = p.experts;
  int *of_cta = counts + 32 * experts, *total = of_cta + experts, *start = total + experts, *first_block = start + experts;
  int *mine = counts + warp * experts, warps = 32 * gridDim.x, everyone = 1024 * gridDim.x;
  int share = (p.tokens + 32 * warps - 1) / (32 * warps) * 32, begin = (32 * rank + warp) * share;
  int end = min(begin + share, p.tokens);
  auto expert_of = [&](int pair) {
    i64 id = pair < end ? p.ids[pair] : -1;
    return id < 0 || id >= experts ? -1 : (int)id;
  };
  allow_next_kernel();
  for (int i = threadIdx.x; i < 32 * experts; i += 1024) counts[i] = 0;
  __syncthreads();
  wait_for_previous_kernel();  // it may have chosen the experts
  for (int i = begin; i < end; i += 128) {  // four loads on their way at once
    int expert[4];
#pragma unroll
    for (int j = 0; j < 4; j++) expert[j] = expert_of(i + 32 * j + lane);
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (expert[j] >= 0) atomicAdd(mine + expert[j], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += 1024) {
    int before = 0;
    for (int w = 0; w < 32; w++) {
      int count = counts[w * experts + e];
      counts[w * experts + e] = before;
      before += count;
    }
    of_cta[e] = before;
  }
  cluster_arrive();
  cluster_wait();
  for (int e = threadIdx.x; e < experts; e += 1024) {
    int before = 0, all = 0;
    for (int r = 0; r < gridDim.x; r++) {
      int count;
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(count) : "r"(address_of_rank(shared_address(of_cta + e), r)) : "memory");
      if (r < rank) before += count;
      all += count;
    }
    start[e] = before, total[e] = all;
  }
  __syncthreads();
  cluster_signal();  // no CTA leaves while another still reads its counts
  if (warp == 0) {
    int before = 0;
    for (int first = 0; first < experts; first += 32) {
      int e = first + lane, count = e < experts ? (total[e] + COLUMNS - 1) / COLUMNS : 0, sum = count;
      for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      if (e < experts) first_block[e] = before + sum - count, start[e] += first_block[e] * COLUMNS;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) first_block[experts] = before;
  }
  __syncthreads();
  for (int e = 32 * rank + warp; e < experts; e += warps)
    for (int b = lane; b < first_block[e + 1] - first_block[e]; b += 32)
      p.block[first_block[e] + b] = make_int2(e, min(COLUMNS, total[e] - b * COLUMNS));
  for (int b = first_block[experts] + 1024 * rank + threadIdx.x; b < p.blocks; b += everyone) p.block[b] = make_int2(0, 0);
  int next = expert_of(begin + lane);
  for (int i = begin; i < end; i += 32) {
    int pair = i + lane, expert = next, column = -1;
    next = expert_of(pair + 32);  // on its way while this one is placed
    u32 same = __match_any_sync(~0u, expert), before = __popc(same & ((1u << lane) - 1));
    if (expert >= 0) column = start[expert] + mine[expert] + before;
    __syncwarp();
    if (expert >= 0 && before == 0) mine[expert] += __popc(same);
    __syncwarp();
    if (pair < end) p.column[pair] = column;
    if (column >= 0) p.pair[column] = pair;
  }
  cluster_wait();
}

// 0 for every output of a pair whose expert does not exist, by all threads.
__device__ __forceinline__ void clear_outputs(const Params& p, i64 pair) {
  for (int i = threadIdx.x; i < p.out; i += blockDim.x) {
    if (X_TYPE == 0)
      ((float*)p.y)[pair * p.out + i] = 0.f;
    else
      ((u16*)p.y)[pair * p.out + i] = 0;
  }
}
