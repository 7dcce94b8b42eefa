// The gradient-variation integral: contract and the arithmetic that CPU and CUDA share.
//
//   score[c] += sum_s omega[s] * norm_k( weight[c,k] * grad[s,c,k] )      grad [S,C,K] contiguous
//
// norm_k(x) is sum|x| (l1), sqrt(sum x^2) (l2) or |sum x| (sum); a null weight means all ones.
//
// Accuracy. Every row is summed in double, whatever the input type:
//  - the product of two floats is exact in double (24 + 24 <= 53 bits), that of two 16-bit numbers
//    already in float (11 + 11 or 8 + 8 <= 24 bits; bf16 only while it stays in float's range);
//  - so the only errors are K additions of 2^-53 relative each and one rounding to the type of
//    score: for l1 and l2 at most K * 2^-53 + 2^-24 relative (K = 10^6: 1.2e-10 + 6e-8), for sum
//    the same K * 2^-53 relative to sum|x|;
//  - squares of floats neither overflow nor vanish: 1e-30 squared is 1e-60.
// On the CPU it costs nothing, the loop waits for memory. On A100/H100 double runs at half the float
// rate, also hidden; consumer GPUs (1/64) become arithmetic bound, which we accept.
//
// Reductions have one fixed order per row, so results have the same bits for any thread count.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define SINGE_HD __host__ __device__ __forceinline__
#else
#define SINGE_HD inline __attribute__((always_inline))
#endif

namespace singe {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };  // of grad and weight
enum class Norm : int { sum = 0, l1 = 1, l2 = 2 };

// Raw bits: no compiler-specific 16-bit type is needed on the host.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// score and omega: double for double inputs, else float.
template <class T>
struct ScoreOf {
  using type = float;
};
template <>
struct ScoreOf<double> {
  using type = double;
};

struct Problem {
  void* score;         // [C]
  const void* grad;    // [S, C, K]
  const void* weight;  // [C, K] or null
  const void* omega;   // [S]
  std::int64_t S, C, K;
  DType dtype;
  Norm norm;
};

SINGE_HD float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// widen(): to a type in which the product of two such numbers is exact.
SINGE_HD double widen(double x) { return x; }
SINGE_HD double widen(float x) { return x; }
SINGE_HD float widen(BFloat16 x) { return float_from_bits(std::uint32_t{x.bits} << 16); }
SINGE_HD float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Branch-free, so that it vectorises. Subnormals go through an integer conversion because the
  // usual multiplication by 2^112 gives 0 for them once torch.set_flush_denormal(True) was called.
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const std::uint32_t rebias = (magnitude >= 0x7c00u ? 224u : 112u) << 23;  // inf, nan : normal
  const float normal = float_from_bits((magnitude << 13) + rebias);
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  const float value = magnitude < 0x0400u ? subnormal : normal;
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return float_from_bits(bits | sign);
#endif
}

template <class T>
SINGE_HD double term(T grad) {
  return static_cast<double>(widen(grad));
}
template <class T>
SINGE_HD double term(T grad, T weight) {
  return static_cast<double>(widen(grad) * widen(weight));
}

// acc = step(acc, x) for every x; partial accumulators are added; finish() gives the norm.
// NaN passes through each of them: there is no comparison anywhere.
template <Norm P>
SINGE_HD double step(double acc, double x) {
  if constexpr (P == Norm::l1) return acc + fabs(x);
  if constexpr (P == Norm::l2) return acc + x * x;
  return acc + x;
}
template <Norm P>
SINGE_HD double finish(double acc) {
  if constexpr (P == Norm::l2) return sqrt(acc);
  if constexpr (P == Norm::sum) return fabs(acc);
  return acc;
}

// Calls f.operator()<T, P>() for the element type and norm of a problem; false if either is unknown.
template <Norm P, class F>
bool dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: f.template operator()<float, P>(); return true;
    case DType::f64: f.template operator()<double, P>(); return true;
    case DType::f16: f.template operator()<Half, P>(); return true;
    case DType::bf16: f.template operator()<BFloat16, P>(); return true;
  }
  return false;
}
template <class F>
bool dispatch(const Problem& problem, F&& f) {
  switch (problem.norm) {
    case Norm::sum: return dispatch_dtype<Norm::sum>(problem.dtype, f);
    case Norm::l1: return dispatch_dtype<Norm::l1>(problem.dtype, f);
    case Norm::l2: return dispatch_dtype<Norm::l2>(problem.dtype, f);
  }
  return false;
}

// integral_cpu.cpp
void accumulate_cpu(const Problem& problem, int num_threads);
const char* cpu_isa();  // the clone of the row function that this machine runs

#if defined(SINGE_WITH_CUDA)
// integral_cuda.cu. Asynchronous on `stream` (a cudaStream_t) of `device`; throws on launch errors.
void accumulate_cuda(const Problem& problem, int device, void* stream);
int cuda_device_count() noexcept;       // 0 without a driver
int cuda_driver_version() noexcept;     // newest CUDA the driver knows, 13000 = 13.0; 0: no driver
int cuda_runtime_version() noexcept;    // CUDA this was built with
std::string cuda_problem(int device);   // why `device` cannot run these kernels, or ""
#endif

}  // namespace singe
