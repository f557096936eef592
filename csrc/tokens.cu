// Kernels over token ids: lookup of their embeddings, greedy choice of the next ones, and the block indices that
// attention wants for the rows before them.

#include "common.cuh"

namespace {

constexpr int kThreads = 256;

}  // namespace

// A block takes one token. An id below zero stands for what slot -1 - id holds, a token sampled a step ago.
extern "C" __global__ void __launch_bounds__(kThreads)
    embed(const int* ids, const int* slot_tokens, const Half* embedding, Half* hidden, int hidden_size) {
  release_dependents();
  wait_for_previous();
  const int known = ids[blockIdx.x];
  const int id = known >= 0 ? known : slot_tokens[-1 - known];
  const Half* from = embedding + static_cast<long long>(id) * hidden_size;
  Half* to = hidden + static_cast<long long>(blockIdx.x) * hidden_size;
  for (int i = threadIdx.x * kVector; i < hidden_size; i += kThreads * kVector) store16(to + i, load16(from + i));
}

namespace {

constexpr int kMaxRows = 4096;
constexpr int kArgmaxChunk = 8192;  // logits of one block

// The best of a row so far and how many blocks have had their say. The last block leaves zeros for the next launch.
__device__ unsigned long long best_of_row[kMaxRows];
__device__ unsigned blocks_done[kMaxRows];

struct Candidate {
  float value;
  int index;

  // Ascending indices come in order, so ties stay with the lowest.
  __device__ __forceinline__ void offer(float other, int at) {
    if (other > value) value = other, index = at;
  }

  // Orders by value, then by lowest index; above zero, which stands for nothing. Negative zero equals zero.
  __device__ __forceinline__ unsigned long long key() const {
    const unsigned bits = __float_as_uint(value + 0.0f);
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - index);
  }
};

__device__ __forceinline__ void offer_vector(Candidate& best, const float* logits, int at) {
  const float4 four = *reinterpret_cast<const float4*>(logits + at);
  best.offer(four.x, at), best.offer(four.y, at + 1), best.offer(four.z, at + 2), best.offer(four.w, at + 3);
}

__device__ __forceinline__ void offer_vector(Candidate& best, const Half* logits, int at) {
  float values[kVector];
  unpack(load16(logits + at), values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) best.offer(values[i], at + i);
}

__device__ __forceinline__ float value_of(float logit) { return logit; }
__device__ __forceinline__ float value_of(Half logit) { return to_float(logit); }

// The best of logits [start, end); 16 bytes a thread where the row lies on such a boundary.
template <typename Logit>
__device__ __forceinline__ Candidate best_in(const Logit* logits, int start, int end) {
  constexpr int kWidth = 16 / sizeof(Logit);
  Candidate best = {-__int_as_float(0x7f800000), start};
  const bool aligned = reinterpret_cast<unsigned long long>(logits) % 16 == 0;
  const int vectors_end = aligned ? start + (end - start) / kWidth * kWidth : start;
#pragma unroll 4
  for (int at = start + threadIdx.x * kWidth; at < vectors_end; at += kThreads * kWidth)
    offer_vector(best, logits, at);
  for (int at = vectors_end + threadIdx.x; at < end; at += kThreads) best.offer(value_of(logits[at]), at);
  return best;
}

__device__ __forceinline__ unsigned long long larger(unsigned long long a, unsigned long long b) {
  return a > b ? a : b;
}

__device__ __forceinline__ unsigned long long best_of_warp(unsigned long long key) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) key = larger(key, __shfl_xor_sync(kAllLanes, key, step));
  return key;
}

__device__ __forceinline__ unsigned long long best_of_block(unsigned long long key) {
  __shared__ unsigned long long warps[kThreads / 32];
  key = best_of_warp(key);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = key;
  __syncthreads();
  return best_of_warp(threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0);  // right in the first warp
}

// One thread a block: enters its best; true for the last of the row, which takes the row's best with it.
__device__ __forceinline__ bool take_if_last(int row, unsigned long long& key) {
  atomicMax(&best_of_row[row], key);
  __threadfence();
  if (atomicAdd(&blocks_done[row], 1) != gridDim.x - 1) return false;
  __threadfence();
  key = atomicExch(&best_of_row[row], 0);
  blocks_done[row] = 0;
  return true;
}

}  // namespace

// Blocks (chunk, row). Writes the index of a row's first largest logit to `out` and to its slot, unless negative.
extern "C" __global__ void __launch_bounds__(kThreads)
    argmax(const void* logits, const int* slots, int* slot_tokens, int* out, long long row_stride, int vocab_size,
           int logits_are_wide) {
  release_dependents();
  wait_for_previous();
  const int row = blockIdx.y, start = blockIdx.x * kArgmaxChunk, end = min(start + kArgmaxChunk, vocab_size);
  const Candidate best = logits_are_wide
                             ? best_in(static_cast<const float*>(logits) + row * row_stride, start, end)
                             : best_in(static_cast<const Half*>(logits) + row * row_stride, start, end);
  unsigned long long key = best_of_block(best.key());
  if (threadIdx.x != 0 || !take_if_last(row, key)) return;
  const int token = static_cast<int>(0xffffffffu - static_cast<unsigned>(key));
  out[row] = token;
  if (slots[row] >= 0) slot_tokens[slots[row]] = token;
}

// out[indptr[i] + j] = bases[i] + j. A thread finds its request by bisection, so long and short ones cost the same.
extern "C" __global__ void __launch_bounds__(kThreads)
    expand_indices(const int* bases, const int* indptr, int* out, int num_requests) {
  release_dependents();
  wait_for_previous();
  const int end = indptr[num_requests];
  for (int at = blockIdx.x * kThreads + threadIdx.x; at < end; at += gridDim.x * kThreads) {
    int low = 0, high = num_requests;  // indptr[low] <= at < indptr[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (indptr[middle] <= at) low = middle; else high = middle;
    }
    out[at] = bases[low] + (at - indptr[low]);
  }
}
