// What the kernels share: 16-bit floats as bits, dependent launches, and nothing that needs a header of the toolkit.
//
// `Half` is bfloat16, or float16 where CHATSERVE_FP16 is defined. Arithmetic is in float32 throughout.

#pragma once

typedef unsigned short Half;

constexpr int kVector = 8;  // halves in 16 bytes, the widest access of one thread
constexpr unsigned kAllLanes = 0xffffffffu;

// Two halves in one word, the lower address in the lower half.
__device__ __forceinline__ float2 unpack(unsigned pair) {
#if defined(CHATSERVE_FP16)
  float2 values;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(values.x), "=f"(values.y)
      : "r"(pair));
  return values;
#else
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#endif
}

__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned pair;
#if defined(CHATSERVE_FP16)
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

__device__ __forceinline__ float to_float(Half value) { return unpack(value).x; }

__device__ __forceinline__ Half to_half(float value) { return static_cast<Half>(pack(value, 0.0f)); }

__device__ __forceinline__ void unpack(const uint4& words, float (&values)[kVector]) {
  const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack(pairs[i]);
    values[2 * i] = two.x;
    values[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ uint4 pack(const float (&values)[kVector]) {
  return make_uint4(pack(values[0], values[1]), pack(values[2], values[3]), pack(values[4], values[5]),
                    pack(values[6], values[7]));
}

__device__ __forceinline__ uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }

__device__ __forceinline__ void store16(void* to, const uint4& words) { *static_cast<uint4*>(to) = words; }

// Let the next kernel of the stream be scheduled: its blocks may prepare whatever does not depend on us.
__device__ __forceinline__ void release_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until here only constants (weights, tables) may be touched: the kernel before us may still be writing.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
