// The element types that the kernels read and write, and the type that each is computed in.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTCLIP_HD __host__ __device__ __forceinline__
#define FASTCLIP_HD_RARE __host__ __device__ __noinline__  // once in each kernel
#else
#define FASTCLIP_HD [[gnu::always_inline]] inline
#define FASTCLIP_HD_RARE inline
#endif

namespace fastclip {

enum class DType : uint8_t { float32, float64, bfloat16, float16 };
constexpr int kNumDTypes = 4;
FASTCLIP_HD constexpr int item_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// 16-bit parameters are computed in float32; only the store rounds.
template <class Stored>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class Stored>
using ComputeType = typename Compute<Stored>::type;

FASTCLIP_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

FASTCLIP_HD uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FASTCLIP_HD float load(float x) { return x; }
FASTCLIP_HD double load(double x) { return x; }

FASTCLIP_HD float load(BFloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

FASTCLIP_HD float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Branchless, so that loops over it vectorise. It makes no subnormal float: torch.set_flush_denormal would turn that
  // into 0, and many CPUs take a hundred cycles for it. The digits of a subnormal half go behind a 2^-14, which is then
  // subtracted.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinities and NaN
  const uint32_t finite = magnitude < 0x00800000u ? subnormal : normal;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  return float_from_bits(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

// Rounds to nearest even, as torch does.
FASTCLIP_HD void store(float& to, float x) { to = x; }
FASTCLIP_HD void store(double& to, double x) { to = x; }

FASTCLIP_HD void store(BFloat16& to, float x) {
#if defined(__CUDA_ARCH__)
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
#endif
}

FASTCLIP_HD void store(Float16& to, float x) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bits_from_float(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // 2^-14 and above: round the 13 bits away, move the bias; 65520 and above carries into infinity.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below: the sum's last place is 2^-24, the spacing of subnormal halves, so the addition rounds.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t nan = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // keeps the NaN's payload, as CPU instructions do
  const uint32_t huge = magnitude > 0x7f800000u ? nan : 0x7c00u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? huge : half;
  to.bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
#endif
}

// ---- stochastic rounding: the chance to round up is the fraction that is cut off -------------------------------

// Hashes 32 bits (lowbias32, by C. Wellons). Rounding needs bits that are evenly distributed, independent of the
// values, and the same on every machine and any number of threads; no more.
FASTCLIP_HD uint32_t hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Returns the key of the noise for some elements. It depends on the seed, the step, the tensor's place in the
// optimizer, the array (0 is the parameter, then its states), and, in large tensors, on the block of 2^32 elements.
FASTCLIP_HD uint32_t noise_key(uint32_t seed, uint32_t step, uint32_t tensor, uint32_t array, int64_t element) {
  const auto high = static_cast<uint32_t>(element >> 32);
  return hash(hash(hash(seed) ^ step) ^ tensor) ^ hash(array + 4 * high);
}
FASTCLIP_HD uint32_t noise(uint32_t key, int64_t element) { return hash(static_cast<uint32_t>(element) ^ key); }

// Rounds at random: adds the noise to the bits that are cut off. A carry rounds up.
FASTCLIP_HD void store(BFloat16& to, float x, uint32_t noise) {
  const uint32_t bits = bits_from_float(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + (noise & 0xffffu)) >> 16);
}

FASTCLIP_HD void store(Float16& to, float x, uint32_t noise) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t cut = noise & 0x1fffu;  // 13 bits are cut off, except for subnormal halves
  const uint32_t normal = (magnitude + cut - (112u << 23)) >> 13;
  // Below 2^-14: multiples of 2^-24, counted by a number below 1,025 with the noise behind its point.
  const float counted = float_from_bits(magnitude) * 0x1p24f + static_cast<float>(cut) * 0x1p-13f;
  const auto subnormal = static_cast<uint32_t>(static_cast<int32_t>(magnitude < 0x38800000u ? counted : 0.0f));
  const uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? huge : half;
  to.bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
}

}  // namespace fastclip
