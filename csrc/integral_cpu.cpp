// CPU: channels are shared out over OpenMP threads, rows are read by one vectorised leaf.
#include <stdexcept>

#include "integral.h"

// One clone of the leaf per ISA, chosen by the loader: one binary, no -march. It sits on the leaf and
// not on the function with `omp parallel`, whose body gcc outlines into a function without clones.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define SINGE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define SINGE_HAS_CLONES 1
#else
#define SINGE_CLONES
#define SINGE_HAS_CLONES 0
#endif

namespace singe {
namespace {

// Below this many elements a parallel region (a few microseconds) costs more than it saves.
constexpr std::int64_t kParallelFrom = 1 << 15;

// N rows `stride` apart, read side by side: one stream does not keep enough cache misses in flight.
// Measured on 2 cores of an AMD EPYC, [4, 512, 4608] float32, l1: N = 1, 2, 4 give 24, 30, 42 GB/s
// (a triad: 35-45). Four streams of 16-bit numbers need more registers than AVX2 has and halve the
// speed, so those get N = 2.
template <class T>
constexpr int kStreams = sizeof(T) >= 4 ? 4 : 2;

// `omp simd reduction` lets the compiler keep one partial sum per lane without -ffast-math, which
// would also assume that there is no NaN.
template <class T, Norm P, bool Weighted, int N>
SINGE_CLONES void row_norms(const T* grad, std::int64_t stride, const T* weight, std::int64_t K,
                            double* norms) {
  static_assert(N == 1 || N == 2 || N == 4);
  const T* const g1 = grad + (N > 1 ? stride : 0);
  const T* const g2 = grad + (N > 2 ? 2 * stride : 0);
  const T* const g3 = grad + (N > 2 ? 3 * stride : 0);
  double a0 = 0, a1 = 0, a2 = 0, a3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3)
  for (std::int64_t k = 0; k < K; ++k) {
    if constexpr (Weighted) {
      a0 = step<P>(a0, term(grad[k], weight[k]));
      if constexpr (N > 1) a1 = step<P>(a1, term(g1[k], weight[k]));
      if constexpr (N > 2) a2 = step<P>(a2, term(g2[k], weight[k]));
      if constexpr (N > 2) a3 = step<P>(a3, term(g3[k], weight[k]));
    } else {
      a0 = step<P>(a0, term(grad[k]));
      if constexpr (N > 1) a1 = step<P>(a1, term(g1[k]));
      if constexpr (N > 2) a2 = step<P>(a2, term(g2[k]));
      if constexpr (N > 2) a3 = step<P>(a3, term(g3[k]));
    }
  }
  norms[0] = finish<P>(a0);
  if constexpr (N > 1) norms[1] = finish<P>(a1);
  if constexpr (N > 2) norms[2] = finish<P>(a2);
  if constexpr (N > 2) norms[3] = finish<P>(a3);
}

// sum_s omega[s] * norm of row s, in the order of s.
template <class T, Norm P, bool Weighted>
double channel(const T* grad, std::int64_t stride, const T* weight,
               const typename ScoreOf<T>::type* omega, std::int64_t S, std::int64_t K) {
  constexpr int N = kStreams<T>;
  double norms[N];
  double total = 0;
  std::int64_t s = 0;
  for (; s + N <= S; s += N) {
    row_norms<T, P, Weighted, N>(grad + s * stride, stride, weight, K, norms);
    for (int i = 0; i < N; ++i) total += omega[s + i] * norms[i];
  }
  for (; s < S; ++s) {
    row_norms<T, P, Weighted, 1>(grad + s * stride, stride, weight, K, norms);
    total += omega[s] * norms[0];
  }
  return total;
}

struct Run {
  const Problem& problem;
  int num_threads;

  template <class T, Norm P>
  void operator()() const {
    using Score = typename ScoreOf<T>::type;
    const std::int64_t S = problem.S, C = problem.C, K = problem.K;
    Score* const score = static_cast<Score*>(problem.score);
    const T* const grad = static_cast<const T*>(problem.grad);
    const T* const weight = static_cast<const T*>(problem.weight);
    const Score* const omega = static_cast<const Score*>(problem.omega);

    // A channel belongs to one thread, so the thread count cannot change a bit of the result.
#pragma omp parallel for schedule(static) num_threads(num_threads) \
    if (num_threads > 1 && C > 1 && S * C * K >= kParallelFrom)
    for (std::int64_t c = 0; c < C; ++c) {
      const double total =
          weight != nullptr
              ? channel<T, P, true>(grad + c * K, C * K, weight + c * K, omega, S, K)
              : channel<T, P, false>(grad + c * K, C * K, nullptr, omega, S, K);
      score[c] = static_cast<Score>(score[c] + total);
    }
  }
};

}  // namespace

void accumulate_cpu(const Problem& problem, int num_threads) {
  if (!dispatch(problem, Run{problem, num_threads < 1 ? 1 : num_threads})) {
    throw std::runtime_error("singe: unknown dtype or norm code");
  }
}

const char* cpu_isa() {
#if SINGE_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "default";
}

}  // namespace singe
