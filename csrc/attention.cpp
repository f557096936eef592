// Causal attention of many sessions over one arena of keys and values, in one call per layer.
//
// The arena is [token, layer, side, kv_head, head_dim] with any strides except 1 in head_dim. A session's history is a
// run of its tokens; rows outside the spans given are never read, because they may not be mapped.
//
// Work is cut into (span, block of query rows, slice of kSlice tokens); a query row is one head of one query. Every
// piece is a softmax of its own whose maximum, sum and weighted values are kept apart; whoever ends the last slice of
// a block merges them in the order of the slices. What is cut where depends on the span alone, so a result is bitwise
// the same whatever else is in the step, and whichever thread runs which piece.
//
// Two kernels: one query has few rows for a key head, so head_dim lies in the vector lanes; several queries have many,
// so query rows lie in the lanes, and each key or value element read serves them all.
//
// Plain C interface, no dependency. Threads come from the OpenMP runtime that the caller has already loaded.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;      // query rows in one vector
constexpr int kTokenBlock = 8;  // kTokenBlock * 2 sums stay in registers
#else
constexpr int kLanes = 8;
constexpr int kTokenBlock = 4;
#endif
constexpr int kDimBlock = kTokenBlock;  // as many sums again; head_dim is a multiple of 8
constexpr int kTile = 16;               // tokens between two looks at the running maximum
constexpr int64_t kAhead = 16;          // tokens between the one read and the one asked for
constexpr int64_t kSlice = 256;         // tokens of one piece of work
constexpr int kMaxHeadDim = 256;
constexpr int kMaxGroup = 8;            // up to here a single query uses the kernel with head_dim in the lanes
constexpr int64_t kSerialWork = 1 << 17;  // multiplications below which waking the other threads costs more
constexpr float kLowest = -1e30f;         // stands for minus infinity, whose difference with itself is not a number

template <int Lanes>
struct Simd {
  typedef float Vec __attribute__((vector_size(Lanes * 4)));
  typedef int32_t Ints __attribute__((vector_size(Lanes * 4)));
  typedef uint32_t Bits __attribute__((vector_size(Lanes * 4)));
  typedef float Loose __attribute__((vector_size(Lanes * 4), aligned(4), may_alias));

  static Vec load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
  static void store(float* to, Vec value) { *reinterpret_cast<Loose*>(to) = value; }
  static Vec fill(float value) { return Vec{} + value; }
  static Vec larger(Vec a, Vec b) { return a > b ? a : b; }

  // 2^x for x <= 0, within 2 ulp; 0 below -126. Cephes' exp2f: round to the nearest integer, a polynomial of degree 6
  // on [-0.5, 0.5], and the integer added to the exponent. Not-a-number stays so; exactly 1 at 0.
  static Vec exp2(Vec x) {
    const Ints vanishes = x < -126.0f;
    x = vanishes ? fill(-126.0f) : x;
    const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer is left in the low bits
    const Vec f = x - (shifted - 12582912.0f);
    Vec y = fill(1.535336188319500e-4f);
    y = y * f + 1.339887440266574e-3f;
    y = y * f + 9.618437357674640e-3f;
    y = y * f + 5.550332471162809e-2f;
    y = y * f + 2.402264791363012e-1f;
    y = y * f + 6.931472028550421e-1f;
    y = y * f + 1.0f;
    Bits bits;
    Bits steps;
    std::memcpy(&bits, &y, sizeof bits);
    std::memcpy(&steps, &shifted, sizeof steps);
    bits += steps << 23;
    std::memcpy(&y, &bits, sizeof y);
    return vanishes ? Vec{} : y;
  }
};

// Lanes folded in halves: the same order on every machine with the same vector length.
template <int Lanes>
inline float sum(typename Simd<Lanes>::Vec value) {
  if constexpr (Lanes == 4) {
    return (value[0] + value[2]) + (value[1] + value[3]);
  } else {
    typedef typename Simd<Lanes / 2>::Vec Half;
    Half halves[2];
    std::memcpy(halves, &value, sizeof value);
    return sum<Lanes / 2>(halves[0] + halves[1]);
  }
}

template <int Lanes>
inline float largest(typename Simd<Lanes>::Vec value) {
  if constexpr (Lanes == 4) {
    return std::max(std::max(value[0], value[2]), std::max(value[1], value[3]));
  } else {
    typedef typename Simd<Lanes / 2>::Vec Half;
    Half halves[2];
    std::memcpy(halves, &value, sizeof value);
    return largest<Lanes / 2>(Simd<Lanes / 2>::larger(halves[0], halves[1]));
  }
}

}  // namespace

extern "C" {

struct ChatserveArena {
  float* data;
  int64_t token_stride, layer_stride, side_stride, head_stride;  // in elements
  int64_t num_heads, num_kv_heads, head_dim;
  float scale;
};

struct ChatserveSpan {
  int64_t query_start, num_queries, base_token, kv_length;  // kv_length counts this step's tokens
};

struct ChatserveRows {  // [n, heads, head_dim], rows `stride` elements apart
  const float* data;
  int64_t stride;
};

typedef void (*ChatserveParallel)(void (*body)(void*), void* argument, unsigned num_threads, unsigned flags);
}

namespace {

typedef ChatserveArena Arena;
typedef ChatserveSpan Span;
typedef ChatserveRows Rows;

// How a span is cut, and where its part of the scratch memory lies.
struct Plan {
  bool single;  // one query with a small group
  int64_t lanes, num_blocks, num_slices, piece_floats, first_task, first_block, scratch;

  Plan(const Arena& arena, const Span& span) {
    const int64_t group = arena.num_heads / arena.num_kv_heads, rows = span.num_queries * group;
    single = span.num_queries == 1 && group <= kMaxGroup;
    lanes = rows <= kLanes ? kLanes : 2 * kLanes;
    num_blocks = single ? 1 : (rows + lanes - 1) / lanes;
    num_slices = (span.kv_length + kSlice - 1) / kSlice;
    const int64_t num_rows = single ? arena.num_heads : arena.num_kv_heads * lanes;
    piece_floats = (num_rows * (arena.head_dim + 2) + 15) / 16 * 16;
    first_task = first_block = scratch = 0;
  }
  int64_t num_tasks() const { return num_blocks * num_slices; }
  int64_t num_floats() const { return num_tasks() * piece_floats; }
};

struct Step {
  const Arena& arena;
  const float* layer;
  const Span* spans;
  std::vector<Plan> plans;
  std::vector<std::atomic<int64_t>> open_slices;  // of each block
  Rows q;
  float* out;
  float* scratch;
  int64_t num_tasks;
  std::atomic<int64_t> next_task{0};

  Step(const Arena& arena, const float* layer, const Span* spans, std::vector<Plan> plans, int64_t num_blocks, Rows q,
       float* out, float* scratch, int64_t num_tasks)
      : arena(arena), layer(layer), spans(spans), plans(std::move(plans)), open_slices(num_blocks), q(q), out(out),
        scratch(scratch), num_tasks(num_tasks) {}
};

// Tokens lie too far apart for the processor to foresee the next one. Asking for a row that does not exist is harmless.
inline void prefetch_ahead(const Arena& arena, const float* key, int64_t dim) {
  const float* ahead = key + kAhead * arena.token_stride;
  for (int64_t element = 0; element < dim; element += 16) {
    __builtin_prefetch(ahead + element);
    __builtin_prefetch(ahead + arena.side_stride + element);
  }
}

// ---- one query: head_dim in the lanes. A piece holds, per head, maximum, sum, and then [heads, head_dim] values.

// `Count` heads of one key head over a tile of `n` tokens.
template <int Lanes, int HeadDim, int Count>
inline void attend_tile(const Arena& arena, const float* keys, const float* values, int64_t n, const float* q,
                        float* maxima, float* sums, float* weighted) {
  typedef Simd<Lanes> S;
  typedef Simd<kTile> T;
  const int64_t dim = HeadDim ? HeadDim : arena.head_dim;
  alignas(64) float weights[Count][kTile];
  for (int64_t t = 0; t < n; ++t) {
    const float* key = keys + t * arena.token_stride;
    prefetch_ahead(arena, key, dim);
    typename S::Vec total[Count] = {};
    for (int64_t c = 0; c < dim; c += Lanes) {
      const typename S::Vec part = S::load(key + c);
      for (int r = 0; r < Count; ++r) total[r] += part * S::load(q + r * dim + c);
    }
    for (int r = 0; r < Count; ++r) weights[r][t] = sum<Lanes>(total[r]);
  }
  float factors[Count];
  for (int r = 0; r < Count; ++r) {
    for (int64_t t = n; t < kTile; ++t) weights[r][t] = kLowest;
    const typename T::Vec scores = T::load(weights[r]) * arena.scale;
    const float maximum = std::max(maxima[r], largest<kTile>(scores));
    const typename T::Vec weight = T::exp2(scores - maximum);
    T::store(weights[r], weight);
    factors[r] = T::exp2(T::fill(maxima[r] - maximum))[0];
    sums[r] = sums[r] * factors[r] + sum<kTile>(weight);
    maxima[r] = maximum;
  }
  for (int64_t c = 0; c < dim; c += Lanes) {
    typename S::Vec total[Count];
    for (int r = 0; r < Count; ++r) total[r] = S::load(weighted + r * dim + c) * factors[r];
    for (int64_t t = 0; t < n; ++t) {
      const typename S::Vec part = S::load(values + t * arena.token_stride + c);
      for (int r = 0; r < Count; ++r) total[r] += part * weights[r][t];
    }
    for (int r = 0; r < Count; ++r) S::store(weighted + r * dim + c, total[r]);
  }
}

template <int Lanes, int HeadDim>
void attend_single(const Step& step, const Span& span, int64_t first, int64_t last, float* piece) {
  const Arena& arena = step.arena;
  const int64_t dim = arena.head_dim, heads = arena.num_heads, group = heads / arena.num_kv_heads;
  float* maxima = piece;
  float* sums = piece + heads;
  float* weighted = piece + 2 * heads;
  std::fill_n(maxima, heads, kLowest);
  std::fill_n(sums, heads * (dim + 1), 0.0f);
  for (int64_t tile = first; tile < last; tile += kTile) {
    const int64_t n = std::min<int64_t>(kTile, last - tile);
    const float* token = step.layer + (span.base_token + tile) * arena.token_stride;
    for (int64_t kv_head = 0; kv_head < arena.num_kv_heads; ++kv_head) {
      const float* keys = token + kv_head * arena.head_stride;
      const float* values = keys + arena.side_stride;
      const int64_t head = kv_head * group;
      const float* q = step.q.data + span.query_start * step.q.stride + head * dim;
      int64_t r = 0;
      for (; r + 2 <= group; r += 2)
        attend_tile<Lanes, HeadDim, 2>(arena, keys, values, n, q + r * dim, maxima + head + r, sums + head + r,
                                       weighted + (head + r) * dim);
      if (r < group)
        attend_tile<Lanes, HeadDim, 1>(arena, keys, values, n, q + r * dim, maxima + head + r, sums + head + r,
                                       weighted + (head + r) * dim);
    }
  }
}

void merge_single(const Step& step, const Span& span, const Plan& plan, const float* pieces) {
  typedef Simd<8> S;
  const int64_t dim = step.arena.head_dim, heads = step.arena.num_heads;
  for (int64_t head = 0; head < heads; ++head) {
    float* out = step.out + (span.query_start * heads + head) * dim;
    float maximum = kLowest, total = 0.0f;
    for (int64_t s = 0; s < plan.num_slices; ++s) maximum = std::max(maximum, pieces[s * plan.piece_floats + head]);
    std::fill_n(out, dim, 0.0f);
    for (int64_t s = 0; s < plan.num_slices; ++s) {
      const float* piece = pieces + s * plan.piece_floats;
      const float factor = S::exp2(S::fill(piece[head] - maximum))[0];
      total += factor * piece[heads + head];
      const float* weighted = piece + 2 * heads + head * dim;
      for (int64_t d = 0; d < dim; ++d) out[d] += factor * weighted[d];
    }
    for (int64_t d = 0; d < dim; ++d) out[d] /= total;
  }
}

// ---- several queries: query rows in the lanes. A piece holds, per key head, maxima and sums of its rows and then
// [head_dim, rows] values. Row r of a span is head r % group (of the key head's group) of query r / group.

template <int Vectors>
struct Block {
  typedef Simd<kLanes> S;
  static constexpr int kRows = Vectors * kLanes;

  // scores[t][rows] of `n` tokens.
  static void score(const Arena& arena, const float* keys, int64_t n, const float* q, float* scores) {
    const int64_t dim = arena.head_dim;
    for (int64_t t = 0; t < n; t += kTokenBlock) {
      const float* key[kTokenBlock];  // past the end: the last token again, so that no other row is read
      for (int i = 0; i < kTokenBlock; ++i) {
        key[i] = keys + std::min(t + i, n - 1) * arena.token_stride;
        prefetch_ahead(arena, key[i], dim);
      }
      typename S::Vec total[kTokenBlock][Vectors] = {};
      for (int64_t d = 0; d < dim; ++d) {
        typename S::Vec part[Vectors];
        for (int v = 0; v < Vectors; ++v) part[v] = S::load(q + d * kRows + v * kLanes);
        for (int i = 0; i < kTokenBlock; ++i)
          for (int v = 0; v < Vectors; ++v) total[i][v] += key[i][d] * part[v];
      }
      for (int i = 0; i < kTokenBlock; ++i)
        for (int v = 0; v < Vectors; ++v) S::store(scores + (t + i) * kRows + v * kLanes, total[i][v]);
    }
  }

  // Scores to weights in place; `seen` [rows] is how many of the tile's tokens each row may see.
  static void soften(int64_t n, const int32_t* seen, float* maxima, float* sums, float* scores, float* factors) {
    for (int v = 0; v < Vectors; ++v) {
      typename S::Ints limit;
      std::memcpy(&limit, seen + v * kLanes, sizeof limit);
      const typename S::Vec before = S::load(maxima + v * kLanes);
      typename S::Vec maximum = before;
      for (int64_t t = 0; t < n; ++t) {
        float* at = scores + t * kRows + v * kLanes;
        const typename S::Vec score = limit > int32_t(t) ? S::load(at) : S::fill(kLowest);
        maximum = S::larger(score, maximum);
      }
      const typename S::Vec factor = S::exp2(before - maximum);
      typename S::Vec total = S::load(sums + v * kLanes) * factor;
      for (int64_t t = 0; t < n; ++t) {
        float* at = scores + t * kRows + v * kLanes;
        const typename S::Vec weight = limit > int32_t(t) ? S::exp2(S::load(at) - maximum) : typename S::Vec{};
        total += weight;
        S::store(at, weight);
      }
      S::store(maxima + v * kLanes, maximum);
      S::store(sums + v * kLanes, total);
      S::store(factors + v * kLanes, factor);
    }
  }

  // weighted[d][rows] = weighted * factor + the tile's values times their weights.
  static void weigh(const float* values, int64_t stride, int64_t n, const float* weights, const float* factors,
                    int64_t dim, float* weighted) {
    for (int64_t d = 0; d < dim; d += kDimBlock) {
      typename S::Vec total[kDimBlock][Vectors];
      for (int i = 0; i < kDimBlock; ++i)
        for (int v = 0; v < Vectors; ++v)
          total[i][v] = S::load(weighted + (d + i) * kRows + v * kLanes) * S::load(factors + v * kLanes);
      for (int64_t t = 0; t < n; ++t) {
        const float* value = values + t * stride + d;
        typename S::Vec weight[Vectors];
        for (int v = 0; v < Vectors; ++v) weight[v] = S::load(weights + t * kRows + v * kLanes);
        for (int i = 0; i < kDimBlock; ++i)
          for (int v = 0; v < Vectors; ++v) total[i][v] += value[i] * weight[v];
      }
      for (int i = 0; i < kDimBlock; ++i)
        for (int v = 0; v < Vectors; ++v) S::store(weighted + (d + i) * kRows + v * kLanes, total[i][v]);
    }
  }

  static void attend(const Step& step, const Span& span, int64_t first_row, int64_t first, int64_t last,
                     float* piece) {
    const Arena& arena = step.arena;
    const int64_t dim = arena.head_dim, group = arena.num_heads / arena.num_kv_heads;
    const int64_t num_rows = std::min<int64_t>(kRows, span.num_queries * group - first_row);
    const int64_t past = span.kv_length - span.num_queries;
    int64_t visible[kRows];
    for (int64_t r = 0; r < kRows; ++r) visible[r] = past + (first_row + std::min(r, num_rows - 1)) / group + 1;
    last = std::min(last, visible[kRows - 1]);
    alignas(64) float q[kMaxHeadDim * kRows];
    alignas(64) float scores[kTile * kRows];
    alignas(64) float factors[kRows];
    alignas(64) int32_t seen[kRows];
    for (int64_t kv_head = 0; kv_head < arena.num_kv_heads; ++kv_head) {
      float* maxima = piece + kv_head * kRows * (dim + 2);
      float* sums = maxima + kRows;
      float* weighted = sums + kRows;
      std::fill_n(maxima, kRows, kLowest);
      std::fill_n(sums, kRows * (dim + 1), 0.0f);
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t row = first_row + std::min(r, num_rows - 1);
        const float* query =
            step.q.data + (span.query_start + row / group) * step.q.stride + (kv_head * group + row % group) * dim;
        for (int64_t d = 0; d < dim; ++d) q[d * kRows + r] = query[d] * arena.scale;
      }
      for (int64_t tile = first; tile < last; tile += kTile) {
        const int64_t n = std::min<int64_t>(kTile, last - tile);
        const float* token = step.layer + (span.base_token + tile) * arena.token_stride;
        const float* keys = token + kv_head * arena.head_stride;
        for (int64_t r = 0; r < kRows; ++r)
          seen[r] = int32_t(std::max<int64_t>(0, std::min<int64_t>(kTile, visible[r] - tile)));
        score(arena, keys, n, q, scores);
        soften(n, seen, maxima, sums, scores, factors);
        weigh(keys + arena.side_stride, arena.token_stride, n, scores, factors, dim, weighted);
      }
    }
  }

  static void merge(const Step& step, const Span& span, const Plan& plan, int64_t first_row, const float* pieces) {
    const Arena& arena = step.arena;
    const int64_t dim = arena.head_dim, heads = arena.num_heads, group = heads / arena.num_kv_heads;
    const int64_t num_rows = std::min<int64_t>(kRows, span.num_queries * group - first_row);
    const int64_t visible = span.kv_length - span.num_queries + (first_row + num_rows - 1) / group + 1;
    const int64_t num_slices = (visible + kSlice - 1) / kSlice;
    alignas(64) float weighted[kMaxHeadDim * kRows];
    for (int64_t kv_head = 0; kv_head < arena.num_kv_heads; ++kv_head) {
      const float* of_head = pieces + kv_head * kRows * (dim + 2);
      typename S::Vec maximum[Vectors], total[Vectors] = {};
      for (int v = 0; v < Vectors; ++v) {
        maximum[v] = S::load(of_head + v * kLanes);
        for (int64_t s = 1; s < num_slices; ++s)
          maximum[v] = S::larger(S::load(of_head + s * plan.piece_floats + v * kLanes), maximum[v]);
      }
      std::fill_n(weighted, dim * kRows, 0.0f);
      for (int64_t s = 0; s < num_slices; ++s) {
        const float* piece = of_head + s * plan.piece_floats;
        for (int v = 0; v < Vectors; ++v) {
          const typename S::Vec factor = S::exp2(S::load(piece + v * kLanes) - maximum[v]);
          total[v] += factor * S::load(piece + kRows + v * kLanes);
          for (int64_t d = 0; d < dim; ++d) {
            float* at = weighted + d * kRows + v * kLanes;
            S::store(at, S::load(at) + factor * S::load(piece + (2 + d) * kRows + v * kLanes));
          }
        }
      }
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t row = first_row + r;
        float* out = step.out + ((span.query_start + row / group) * heads + kv_head * group + row % group) * dim;
        const float divisor = total[r / kLanes][r % kLanes];
        for (int64_t d = 0; d < dim; ++d) out[d] = weighted[d * kRows + r] / divisor;
      }
    }
  }
};

// ---- the step

void run_piece(const Step& step, const Span& span, const Plan& plan, int64_t block, int64_t slice, float* piece) {
  const int64_t first = slice * kSlice, last = std::min(first + kSlice, span.kv_length);
  const int64_t dim = step.arena.head_dim;
  if (!plan.single) {
    const auto attend = plan.lanes == kLanes ? Block<1>::attend : Block<2>::attend;
    attend(step, span, block * plan.lanes, first, last, piece);
  } else if (dim == 64) {
    attend_single<kLanes, 64>(step, span, first, last, piece);
  } else if (dim == 128) {
    attend_single<kLanes, 128>(step, span, first, last, piece);
  } else if (dim % kLanes == 0) {
    attend_single<kLanes, 0>(step, span, first, last, piece);
  } else {
    attend_single<8, 0>(step, span, first, last, piece);
  }
}

void run_task(Step& step, int64_t task) {
  auto after = std::upper_bound(step.plans.begin(), step.plans.end(), task,
                                [](int64_t index, const Plan& plan) { return index < plan.first_task; });
  const Plan& plan = *--after;
  const Span& span = step.spans[&plan - step.plans.data()];
  const int64_t block = (task - plan.first_task) / plan.num_slices, slice = (task - plan.first_task) % plan.num_slices;
  float* pieces = step.scratch + plan.scratch + block * plan.num_slices * plan.piece_floats;
  run_piece(step, span, plan, block, slice, pieces + slice * plan.piece_floats);
  if (step.open_slices[plan.first_block + block].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  if (plan.single) {
    merge_single(step, span, plan, pieces);
  } else {
    (plan.lanes == kLanes ? Block<1>::merge : Block<2>::merge)(step, span, plan, block * plan.lanes, pieces);
  }
}

void run_tasks(void* argument) {
  Step& step = *static_cast<Step*>(argument);
  for (;;) {
    const int64_t task = step.next_task.fetch_add(1, std::memory_order_relaxed);
    if (task >= step.num_tasks) return;
    run_task(step, task);
  }
}

void write_rows(const Arena& arena, float* layer, const Span& span, Rows rows, int64_t side) {
  for (int64_t i = 0; i < span.num_queries; ++i) {
    const float* from = rows.data + (span.query_start + i) * rows.stride;
    float* to = layer + (span.base_token + span.kv_length - span.num_queries + i) * arena.token_stride +
                side * arena.side_stride;
    for (int64_t head = 0; head < arena.num_kv_heads; ++head)
      std::memcpy(to + head * arena.head_stride, from + head * arena.head_dim, arena.head_dim * sizeof(float));
  }
}

}  // namespace

extern "C" {

// Floats of scratch memory that a step of these spans needs.
int64_t chatserve_scratch_floats(const ChatserveArena* arena, const ChatserveSpan* spans, int64_t num_spans) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_spans; ++i) total += Plan(*arena, spans[i]).num_floats();
  return total;
}

// Write the step's keys and values to their rows of `layer`, then attend: `out` is [n, num_heads, head_dim].
void chatserve_attend(const ChatserveArena* arena, const ChatserveSpan* spans, int64_t num_spans, float* scratch,
                      int64_t layer, const float* q, int64_t q_stride, const float* k, int64_t k_stride,
                      const float* v, int64_t v_stride, float* out, int64_t num_threads,
                      ChatserveParallel parallel) {
  float* rows = arena->data + layer * arena->layer_stride;
  std::vector<Plan> plans;
  plans.reserve(num_spans);
  int64_t num_tasks = 0, num_blocks = 0, num_floats = 0, work = 0;
  for (int64_t i = 0; i < num_spans; ++i) {
    write_rows(*arena, rows, spans[i], Rows{k, k_stride}, 0);
    write_rows(*arena, rows, spans[i], Rows{v, v_stride}, 1);
    Plan plan(*arena, spans[i]);
    plan.first_task = num_tasks;
    plan.first_block = num_blocks;
    plan.scratch = num_floats;
    num_tasks += plan.num_tasks();
    num_blocks += plan.num_blocks;
    num_floats += plan.num_floats();
    work += spans[i].num_queries * spans[i].kv_length * arena->num_heads * arena->head_dim;
    plans.push_back(plan);
  }
  Step step(*arena, rows, spans, std::move(plans), num_blocks, Rows{q, q_stride}, out, scratch, num_tasks);
  for (const Plan& plan : step.plans)
    for (int64_t block = 0; block < plan.num_blocks; ++block)
      step.open_slices[plan.first_block + block].store(plan.num_slices, std::memory_order_relaxed);
  // Always the whole team: libgomp ends the threads that a smaller one leaves over.
  if (parallel && num_threads > 1 && num_tasks > 1 && work > kSerialWork) {
    parallel(run_tasks, &step, unsigned(num_threads), 0);
  } else {
    run_tasks(&step);
  }
}
}
