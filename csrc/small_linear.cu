// y = x W^T for a handful of tokens, when all the time goes into reading W once.
//
// One block a multiprocessor takes every so many tiles of 8 rows of W. One warp copies them, kChunk columns at a time,
// into a ring in shared memory with bulk copies; eight warps multiply, each its slice of the columns, with the tensor
// cores: 8 rows of W against up to 8 tokens, padded to 16. W is constant, so the ring fills before the previous kernel
// has ended, while what comes before the product (norm, gate) waits for it. A bulk copy of 1 KiB costs as much time as
// one of 2 KiB: a row's part must be that long. The ring takes all shared memory: with less, two blocks of the next
// kernel come to lie on the multiprocessors that are free first, and others get none. Asking the L2 cache for the
// next kernel's weights was tried, from 4 to 33 MB of them: a step took as long or up to 5 % longer.
//
// The columns are permuted within 32: a lane reads 8 neighbours with one access and feeds them to two products. The
// rows of x are read the same way, so the sum is the same.

#include "common.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "bulk copies need compute capability 9.0 (Hopper) or later"
#endif

namespace {

typedef unsigned long long Address;

constexpr int kChunk = 1024;                           // columns of one stage
constexpr int kRows = 8;                               // rows of W in a tile
constexpr int kTokens = 8;                             // at most
constexpr int kWarps = 8;                              // that multiply
constexpr int kWorkers = kWarps * 32;
constexpr int kThreads = kWorkers + 32;                // and the warp that copies
constexpr int kPad = 64;                               // bytes that put neighbouring rows into different banks
constexpr int kPitch = kChunk * sizeof(Half) + kPad;   // bytes from row to row of a stage
constexpr int kStageBytes = kRows * kPitch;
constexpr int kWarpColumns = kChunk / kWarps;
constexpr int kStep = 32;                              // columns of two products

enum Input { kPlain, kNormed };

// ---- shared memory barriers and bulk copies

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(Address* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(Address* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_expect(Address* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(Address* barrier, unsigned parity) {
  unsigned done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// W is read once a step: it leaves the L2 cache before what is read again.
__device__ __forceinline__ Address read_once() {
  Address policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// x is read by every block.
__device__ __forceinline__ Address read_often() {
  Address policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void bulk_copy(void* to, const void* from, unsigned bytes, Address* barrier,
                                          Address policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :
      : "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void workers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory"); }

// ---- the work of one launch

struct Problem {
  const Half* x;         // [num_tokens, K], or [num_tokens, 2 K] gate and up
  const Half* weight;    // [N, K]
  const Half* norm;      // [K]
  const Half* bias;      // [N]
  const Half* residual;  // [num_tokens, N]
  void* out;             // [num_tokens, N], or [num_tokens, N / 2] if activated; of Half or float
  long long x_stride;
  long long residual_stride;
  long long out_stride;
  float eps;
  int num_tokens;
  int N;
  int K;
  int input;
  int activated;  // W is gate, then up: the output is silu(gate) * up
  int out_is_wide;
  int num_stages;
};

__device__ __forceinline__ int tiles_of(const Problem& p) { return (p.N + kRows - 1) / kRows; }

// The row of W that is number `index` of a tile. Gate and up take turns, so that one lane gets both.
__device__ __forceinline__ int row_of(const Problem& p, int tile, int index) {
  const int row = tile * kRows + index;
  return p.activated ? row / 2 + index % 2 * (p.N / 2) : row;
}

__device__ __forceinline__ int x_pitch(int columns) {
  return (columns * static_cast<int>(sizeof(Half)) + 127) / 128 * 128 + kPad;
}

// Shared memory: the ring, x, the norm's weights, sums of the warps (twice), sums of squares, barriers.
struct Memory {
  char* ring;
  char* x;
  char* norm;
  float2* sums;
  float* squares;
  Address* full;
  Address* empty;
  Address* x_arrived;

  __device__ __forceinline__ Memory(char* start, const Problem& p) {
    ring = start;
    x = ring + p.num_stages * kStageBytes;
    norm = x + p.num_tokens * x_pitch(p.K);
    sums = reinterpret_cast<float2*>(norm + (p.input == kNormed ? p.K * sizeof(Half) : 0));
    squares = reinterpret_cast<float*>(sums + 2 * kWarps * 32);
    full = reinterpret_cast<Address*>(squares + kTokens * kWarps);
    empty = full + p.num_stages;
    x_arrived = empty + p.num_stages;
  }
};

// Where the ring stands; the parity flips with each round.
struct Cursor {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance(int num_stages) {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

// The copying warp: a row of the tile each for its first lanes.
__device__ __forceinline__ void copy_weights(const Problem& p, const Memory& memory, int lane) {
  const Address policy = read_once();
  Cursor at;
  for (int tile = blockIdx.x; tile < tiles_of(p); tile += gridDim.x) {
    const int num_rows = min(kRows, p.N - tile * kRows);
    const Half* from = p.weight + static_cast<long long>(row_of(p, tile, lane)) * p.K;
    for (int column = 0; column < p.K; column += kChunk) {
      const unsigned bytes = min(kChunk, p.K - column) * sizeof(Half);
      barrier_wait(&memory.empty[at.stage], at.parity ^ 1);
      if (lane == 0) barrier_expect(&memory.full[at.stage], bytes * num_rows);
      __syncwarp();
      char* to = memory.ring + at.stage * kStageBytes + lane * kPitch;
      if (lane < num_rows) bulk_copy(to, from + column, bytes, &memory.full[at.stage], policy);
      at.advance(p.num_stages);
    }
  }
}

// ---- x, as the product wants it, in shared memory

__device__ __forceinline__ float silu(float value) { return value / (1.0f + __expf(-value)); }

// Brings the rows of x as they are.
__device__ __forceinline__ void copy_rows(const Problem& p, const Memory& memory, int thread) {
  const unsigned bytes = p.K * sizeof(Half);
  if (thread == 0) {
    barrier_expect(memory.x_arrived, bytes * p.num_tokens);
    const Address policy = read_often();
    for (int token = 0; token < p.num_tokens; ++token)
      bulk_copy(memory.x + token * x_pitch(p.K), p.x + token * p.x_stride, bytes, memory.x_arrived, policy);
  }
  barrier_wait(memory.x_arrived, 0);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ __forceinline__ void sum_squares(const Problem& p, const Memory& memory, int token, int thread) {
  const char* row = memory.x + token * x_pitch(p.K);
  float sum = 0.0f, values[kVector];
  for (int at = thread; at < p.K / kVector; at += kWorkers) {
    unpack(load16(row + at * sizeof(uint4)), values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += values[i] * values[i];
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) memory.squares[token * kWarps + thread / 32] = sum;
}

__device__ __forceinline__ void scale_row(const Problem& p, const Memory& memory, int token, int thread) {
  char* row = memory.x + token * x_pitch(p.K);
  float sum = 0.0f, values[kVector], weights[kVector];
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += memory.squares[token * kWarps + i];
  const float factor = rsqrtf(sum / p.K + p.eps);
  for (int at = thread; at < p.K / kVector; at += kWorkers) {
    unpack(load16(row + at * sizeof(uint4)), values);
    unpack(load16(memory.norm + at * sizeof(uint4)), weights);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= factor * weights[i];
    store16(row + at * sizeof(uint4), pack(values));
  }
}

__device__ __forceinline__ void prepare_x(const Problem& p, const Memory& memory, int thread) {
  if (p.input == kNormed)
    for (int at = thread; at < p.K / kVector; at += kWorkers)
      store16(memory.norm + at * sizeof(uint4), load16(p.norm + at * kVector));
  wait_for_previous();
  copy_rows(p, memory, thread);
  if (p.input != kNormed) return;
  for (int token = 0; token < p.num_tokens; ++token) sum_squares(p, memory, token, thread);
  workers_sync();
  for (int token = 0; token < p.num_tokens; ++token) scale_row(p, memory, token, thread);
  workers_sync();
}

// ---- the product

// sums += x W^T for 8 tokens, 8 rows of W and 16 columns; the other 8 tokens that the instruction takes are zeros.
__device__ __forceinline__ void multiply(float (&sums)[4], unsigned x0, unsigned x1, unsigned w0, unsigned w1) {
#if defined(CHATSERVE_FP16)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
#endif
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(x0), "r"(0), "r"(x1), "r"(w0), "r"(w1));
}

// One warp's columns of one stage. `x` is the lane's place in its token's row, null for padding; `columns` are left.
__device__ __forceinline__ void multiply_stage(const char* weights, const char* x, int columns, float (&even)[4],
                                               float (&odd)[4]) {
  const uint4 zero = {};
#pragma unroll
  for (int step = 0; step < kWarpColumns; step += kStep) {
    const bool inside = step < columns;  // what lies behind a row's end is not even a number
    const uint4 w = inside ? load16(weights + step * sizeof(Half)) : zero;
    const uint4 token = inside && x ? load16(x + step * sizeof(Half)) : zero;
    multiply(even, token.x, token.y, w.x, w.y);
    multiply(odd, token.z, token.w, w.z, w.w);
  }
}

// ---- what becomes of the sums: a lane has two rows of W for one token

struct Epilogue {
  float bias[2];
  float residual[2];

  // Asks for bias and residual long before the sums are there.
  __device__ __forceinline__ void fetch(const Problem& p, int tile, int lane) {
    const int token = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int index = lane % 4 * 2 + i;
      bias[i] = residual[i] = 0.0f;
      if (token >= p.num_tokens || tile * kRows + index >= p.N) continue;
      const int row = row_of(p, tile, index);
      if (p.bias) bias[i] = to_float(p.bias[row]);
      if (p.residual) residual[i] = to_float(p.residual[token * p.residual_stride + row]);
    }
  }

  __device__ __forceinline__ void finish(const Problem& p, int tile, const float2* parts, int lane) const {
    float totals[2] = {bias[0], bias[1]};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float2 part = parts[warp * 32 + lane];
      totals[0] += part.x, totals[1] += part.y;
    }
    const int token = lane / 4, row = tile * kRows + lane % 4 * 2;
    if (token >= p.num_tokens || row >= p.N) return;
    const long long at = token * p.out_stride;
    if (p.activated) return store(p, at + row / 2, silu(totals[0]) * totals[1]);
    store(p, at + row, totals[0] + residual[0]);
    if (row + 1 < p.N) store(p, at + row + 1, totals[1] + residual[1]);
  }

  __device__ __forceinline__ static void store(const Problem& p, long long at, float value) {
    if (p.out_is_wide)
      static_cast<float*>(p.out)[at] = value;
    else
      static_cast<Half*>(p.out)[at] = to_half(value);
  }
};

// The multiplying warps. They meet once a tile, when its sums are complete; they take turns to write it.
__device__ __forceinline__ void multiply_tiles(const Problem& p, const Memory& memory, int warp, int lane) {
  const int group = lane / 4, column = warp * kWarpColumns + lane % 4 * kVector;
  const char* x = group < p.num_tokens ? memory.x + group * x_pitch(p.K) + column * sizeof(Half) : nullptr;
  const char* weights = memory.ring + group * kPitch + column * sizeof(Half);
  Cursor at;
  Epilogue epilogue;
  int turn = 0;
  for (int tile = blockIdx.x; tile < tiles_of(p); tile += gridDim.x, ++turn) {
    const bool writes = turn % kWarps == warp;
    float even[4] = {}, odd[4] = {};
    if (writes) epilogue.fetch(p, tile, lane);
    for (int first = 0; first < p.K; first += kChunk) {
      const char* tokens = x ? x + first * sizeof(Half) : nullptr;
      barrier_wait(&memory.full[at.stage], at.parity);
      multiply_stage(weights + at.stage * kStageBytes, tokens, p.K - first - column, even, odd);
      __syncwarp();
      if (lane == 0) barrier_arrive(&memory.empty[at.stage]);
      at.advance(p.num_stages);
    }
    float2* parts = memory.sums + turn % 2 * kWarps * 32;
    parts[warp * 32 + lane] = make_float2(even[0] + odd[0], even[1] + odd[1]);
    workers_sync();  // also: the sums of two tiles ago have been read
    if (writes) epilogue.finish(p, tile, parts, lane);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    small_linear(const Half* x, const Half* weight, const Half* norm, const Half* bias, const Half* residual, void* out,
                 long long x_stride, long long residual_stride, long long out_stride, float eps, int num_tokens, int N,
                 int K, int input, int activated, int out_is_wide, int num_stages) {
  extern __shared__ __align__(128) char shared[];
  const Problem p = {x,   weight,     norm, bias, residual, out,       x_stride,    residual_stride, out_stride,
                     eps, num_tokens, N,    K,    input,    activated, out_is_wide, num_stages};
  const Memory memory(shared, p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  release_dependents();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < num_stages; ++stage) {
      barrier_init(&memory.full[stage], 1);
      barrier_init(&memory.empty[stage], kWarps);
    }
    barrier_init(memory.x_arrived, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (warp == kWarps) {
    copy_weights(p, memory, lane);
    return;
  }
  prepare_x(p, memory, threadIdx.x);
  multiply_tiles(p, memory, warp, lane);
}
