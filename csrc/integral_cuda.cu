// CUDA: a warp (short rows) or a block (long rows) per channel, summed in one fixed order.
//
// No float atomics and no order that depends on the schedule: the same bits on every run. Rows are
// not split over blocks, so a problem with few channels and very long rows (10 channels of 10^6)
// leaves most of the GPU idle. Layers like that are a classifier's output, which is not pruned; a
// second stage would need a workspace and another launch for all the others.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "integral.h"

namespace singe {
namespace {

constexpr int kBlock = 256;
constexpr int kWarp = 32;
constexpr int kStreams = 4;           // rows s..s+3 read side by side, with one read of the weights
constexpr std::int64_t kWarpRow = 1024;      // up to this K a warp per channel, above it a block
constexpr std::int64_t kMaxBlocks = 65535;   // beyond it blocks stride over the channels
constexpr unsigned kAllLanes = 0xffffffffu;

// What one thread reads of one row at a time: 16 bytes in one load where every row starts on a 16
// byte boundary (Packed), else up to 4 single elements, a row's width of threads apart.
template <class T, bool Packed>
struct alignas(Packed ? 16 : sizeof(T)) Chunk {
  static constexpr int size = Packed || sizeof(T) > 4 ? 16 / sizeof(T) : 4;
  T at[size];
};

// Elements beyond `end` are 0 and add nothing to any norm.
template <class T, bool Packed>
__device__ __forceinline__ Chunk<T, Packed> load(const T* row, std::int64_t first, int lane,
                                                 int row_threads, std::int64_t end) {
  using Data = Chunk<T, Packed>;
  Data data = {};
  if constexpr (Packed) {
    const std::int64_t k = first + lane * Data::size;
    if (k < end) data = *reinterpret_cast<const Data*>(row + k);
  } else {
#pragma unroll
    for (int i = 0; i < Data::size; ++i) {
      const std::int64_t k = first + i * row_threads + lane;
      if (k < end) data.at[i] = row[k];
    }
  }
  return data;
}

// At least 3 blocks per SM: up to 80 registers. Left alone, ptxas 13.0 spills for 5 or 6 blocks.
template <class T, Norm P, bool Packed>
__global__ void __launch_bounds__(kBlock, 3)
    accumulate_kernel(typename ScoreOf<T>::type* __restrict__ score, const T* __restrict__ grad,
                      const T* __restrict__ weight,
                      const typename ScoreOf<T>::type* __restrict__ omega, std::int64_t S,
                      std::int64_t C, std::int64_t K, int row_threads) {
  using Score = typename ScoreOf<T>::type;
  using Data = Chunk<T, Packed>;
  __shared__ double partial[kStreams][kBlock / kWarp];
  const int lane = static_cast<int>(threadIdx.x) % row_threads;
  const std::int64_t rows = kBlock / row_threads;

  for (std::int64_t first_row = std::int64_t{blockIdx.x} * rows; first_row < C;
       first_row += std::int64_t{gridDim.x} * rows) {
    const std::int64_t c = first_row + static_cast<int>(threadIdx.x) / row_threads;
    const std::int64_t end = c < C ? K : 0;  // idle rows still take part in the barriers
    double total = 0;
    for (std::int64_t s = 0; s < S; s += kStreams) {
      double acc[kStreams] = {};
      for (std::int64_t k = 0; k < end; k += row_threads * Data::size) {
        Data b_grad[kStreams] = {}, b_weight = {};  // all loads first: they are in flight together
        if (weight != nullptr) {
          b_weight = load<T, Packed>(weight + c * K, k, lane, row_threads, end);
        }
#pragma unroll
        for (int i = 0; i < kStreams; ++i) {
          if (s + i < S) {
            b_grad[i] = load<T, Packed>(grad + ((s + i) * C + c) * K, k, lane, row_threads, end);
          }
        }
#pragma unroll
        for (int i = 0; i < kStreams; ++i) {
#pragma unroll
          for (int j = 0; j < Data::size; ++j) {
            acc[i] = step<P>(acc[i], weight != nullptr ? term(b_grad[i].at[j], b_weight.at[j])
                                                       : term(b_grad[i].at[j]));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kStreams; ++i) {
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
          acc[i] += __shfl_down_sync(kAllLanes, acc[i], offset);
        }
      }
      if (row_threads > kWarp) {
        const int warp = lane / kWarp;
        if (lane % kWarp == 0) {
#pragma unroll
          for (int i = 0; i < kStreams; ++i) partial[i][warp] = acc[i];
        }
        __syncthreads();
        if (lane == 0) {
#pragma unroll
          for (int i = 0; i < kStreams; ++i) {
            acc[i] = 0;
            for (int w = 0; w < kBlock / kWarp; ++w) acc[i] += partial[i][w];
          }
        }
        __syncthreads();
      }
      if (lane == 0) {
        for (int i = 0; i < kStreams && s + i < S; ++i) total += omega[s + i] * finish<P>(acc[i]);
      }
    }
    if (lane == 0 && c < C) score[c] = static_cast<Score>(score[c] + total);
  }
}

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error stays with us and is not reported again by the next call
  throw std::runtime_error(std::string("singe: CUDA: ") + cudaGetErrorString(status) +
                           " (kernels built for " SINGE_CUDA_ARCHS ")");
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

struct Run {
  const Problem& problem;
  cudaStream_t stream;

  template <class T, Norm P, bool Packed>
  void launch() const {
    using Score = typename ScoreOf<T>::type;
    const int row_threads = problem.K <= kWarpRow ? kWarp : kBlock;
    const std::int64_t rows = kBlock / row_threads;
    const std::int64_t blocks = std::min((problem.C + rows - 1) / rows, kMaxBlocks);
    accumulate_kernel<T, P, Packed><<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(
        static_cast<Score*>(problem.score), static_cast<const T*>(problem.grad),
        static_cast<const T*>(problem.weight), static_cast<const Score*>(problem.omega), problem.S,
        problem.C, problem.K, row_threads);
  }

  template <class T, Norm P>
  void operator()() const {
    constexpr std::uintptr_t bytes = 16;
    const auto aligned = [](const void* pointer) {
      return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
    };
    const bool packed = problem.K * sizeof(T) % bytes == 0 && aligned(problem.grad) &&
                        aligned(problem.weight);  // null is aligned
    packed ? launch<T, P, true>() : launch<T, P, false>();
  }
};

}  // namespace

void accumulate_cuda(const Problem& problem, int device, void* stream) {
  if (problem.C == 0) return;  // a grid of no blocks is an error
  const DeviceGuard guard(device);
  if (!dispatch(problem, Run{problem, static_cast<cudaStream_t>(stream)})) {
    throw std::runtime_error("singe: unknown dtype or norm code");
  }
  check(cudaGetLastError());
}

int cuda_device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

int cuda_driver_version() noexcept {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int cuda_runtime_version() noexcept { return CUDART_VERSION; }

std::string cuda_problem(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;  // fails where no image of the kernel fits the device
    check(cudaFuncGetAttributes(&attributes, accumulate_kernel<float, Norm::l1, false>));
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace singe
