// Rotary embedding of queries and keys, and the write of keys and values to the arena, in one launch.
//
// HEAD_DIM is given by the compiler's command line.

#include "common.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kPair = HEAD_DIM / 2;                // a head's two halves are the coordinates that rotate together
constexpr int kBusyLanes = HEAD_DIM / 2 / kVector;  // threads of one head, each with a vector of either half

__device__ constexpr int next_power_of_two(int number) {
  return number <= 1 ? 1 : 2 * next_power_of_two((number + 1) / 2);
}

constexpr int kLanes = next_power_of_two(kBusyLanes);

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "a thread holds 16 bytes of either half of a head");

__device__ __forceinline__ float sum_of_squares(const float (&low)[kVector], const float (&high)[kVector]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum += low[i] * low[i] + high[i] * high[i];
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

__device__ __forceinline__ void scale_by(float factor, const Half* weight, float (&values)[kVector]) {
  float weights[kVector];
  unpack(load16(weight), weights);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] *= factor * weights[i];
}

__device__ __forceinline__ void load_floats(const float* from, float (&values)[kVector]) {
  const float4 first = reinterpret_cast<const float4*>(from)[0], second = reinterpret_cast<const float4*>(from)[1];
  values[0] = first.x, values[1] = first.y, values[2] = first.z, values[3] = first.w;
  values[4] = second.x, values[5] = second.y, values[6] = second.z, values[7] = second.w;
}

__device__ __forceinline__ void rotate(const float* cos_sin, float (&low)[kVector], float (&high)[kVector]) {
  float cos[kVector], sin[kVector];
  load_floats(cos_sin, cos);
  load_floats(cos_sin + kPair, sin);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float rotated = low[i] * cos[i] - high[i] * sin[i];
    high[i] = high[i] * cos[i] + low[i] * sin[i];
    low[i] = rotated;
  }
}

__device__ __forceinline__ long long row_at(const void* rows, int token, bool are_wide) {
  return are_wide ? static_cast<const long long*>(rows)[token] : static_cast<const int*>(rows)[token];
}

}  // namespace

// A group of kLanes threads takes one head of one token. `heads` [n, num_heads + 2 * num_kv_heads, HEAD_DIM] are
// queries, keys and values; `cos_sin` is [max_position, 2, HEAD_DIM / 2]; a negative row is not stored.
extern "C" __global__ void __launch_bounds__(kThreads)
    rotate_and_store(const Half* heads, const Half* qk_norm, const float* cos_sin, const int* positions,
                     const void* rows, Half* keys_values, Half* q, long long token_stride, float eps, int rows_are_wide,
                     int num_tokens, int num_heads, int num_kv_heads) {
  release_dependents();
  const int item = (blockIdx.x * kThreads + threadIdx.x) / kLanes, lane = threadIdx.x % kLanes;
  const int num_rotated = num_heads + num_kv_heads, heads_per_token = num_rotated + num_kv_heads;
  const int token = item / heads_per_token, head = item % heads_per_token;
  const bool busy = token < num_tokens && lane < kBusyLanes;
  wait_for_previous();
  float low[kVector] = {}, high[kVector] = {};
  const Half* from = heads + static_cast<long long>(item) * HEAD_DIM + lane * kVector;
  long long row = 0, position = 0;
  if (busy) {  // all that memory must answer is asked for at once
    const uint4 first = load16(from), second = load16(from + kPair);
    position = positions[token];
    if (head >= num_heads) row = row_at(rows, token, rows_are_wide);
    unpack(first, low);
    unpack(second, high);
  }
  if (qk_norm) {
    const float factor = rsqrtf(sum_of_squares(low, high) / HEAD_DIM + eps);
    if (busy && head < num_rotated) {
      const Half* weight = qk_norm + head * HEAD_DIM + lane * kVector;
      scale_by(factor, weight, low);
      scale_by(factor, weight + kPair, high);
    }
  }
  if (!busy || row < 0) return;
  if (head < num_rotated) rotate(cos_sin + position * HEAD_DIM + lane * kVector, low, high);
  Half* to = head < num_heads ? q + (static_cast<long long>(token) * num_heads + head) * HEAD_DIM
                              : keys_values + row * token_stride + static_cast<long long>(head - num_heads) * HEAD_DIM;
  store16(to + lane * kVector, pack(low));
  store16(to + lane * kVector + kPair, pack(high));
}
