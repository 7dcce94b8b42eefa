// singe._core: pointers, sizes and a stream come in as integers, so that nothing of torch is needed.
// Whoever calls has checked shapes, dtypes and devices: singe/kernels/integral.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "integral.h"

namespace py = pybind11;

namespace {

using singe::Problem;

Problem problem(std::uintptr_t score, std::uintptr_t grad, std::uintptr_t weight,
                std::uintptr_t omega, std::int64_t S, std::int64_t C, std::int64_t K, int dtype,
                int norm) {
  if (S < 0 || C < 0 || K < 0) throw std::invalid_argument("singe: a negative size");
  return {reinterpret_cast<void*>(score),
          reinterpret_cast<const void*>(grad),
          reinterpret_cast<const void*>(weight),
          reinterpret_cast<const void*>(omega),
          S,
          C,
          K,
          static_cast<singe::DType>(dtype),
          static_cast<singe::Norm>(norm)};
}

void accumulate_cpu(std::uintptr_t score, std::uintptr_t grad, std::uintptr_t weight,
                    std::uintptr_t omega, std::int64_t S, std::int64_t C, std::int64_t K, int dtype,
                    int norm, int num_threads) {
  const Problem p = problem(score, grad, weight, omega, S, C, K, dtype, norm);
  const py::gil_scoped_release release;
  singe::accumulate_cpu(p, num_threads);
}

void accumulate_cuda(std::uintptr_t score, std::uintptr_t grad, std::uintptr_t weight,
                     std::uintptr_t omega, std::int64_t S, std::int64_t C, std::int64_t K,
                     int dtype, int norm, int device, std::uintptr_t stream) {
  const Problem p = problem(score, grad, weight, omega, S, C, K, dtype, norm);
#if defined(SINGE_WITH_CUDA)
  const py::gil_scoped_release release;
  singe::accumulate_cuda(p, device, reinterpret_cast<void*>(stream));
#else
  static_cast<void>(p);
  static_cast<void>(device);
  static_cast<void>(stream);
  throw std::runtime_error("singe: built without CUDA (" SINGE_CUDA_NOTE ")");
#endif
}

int cuda_device_count() {
#if defined(SINGE_WITH_CUDA)
  return singe::cuda_device_count();
#else
  return 0;
#endif
}

int cuda_driver_version() {
#if defined(SINGE_WITH_CUDA)
  return singe::cuda_driver_version();
#else
  return 0;
#endif
}

std::string cuda_problem(int device) {
#if defined(SINGE_WITH_CUDA)
  return singe::cuda_problem(device);
#else
  static_cast<void>(device);
  return "singe: built without CUDA (" SINGE_CUDA_NOTE ")";
#endif
}

py::dict build_info() {
  std::vector<std::string> archs;
  py::dict info;
  info["version"] = SINGE_VERSION;
  info["compiler"] = SINGE_COMPILER;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cpu_isa"] = singe::cpu_isa();
#if defined(SINGE_WITH_CUDA)
  std::istringstream list(SINGE_CUDA_ARCHS);
  for (std::string arch; list >> arch;) archs.push_back(arch);
  info["cuda"] = true;
  info["cuda_version"] = singe::cuda_runtime_version();
#else
  info["cuda"] = false;
  info["cuda_version"] = 0;
#endif
  info["cuda_archs"] = archs;
  info["cuda_note"] = SINGE_CUDA_NOTE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  using py::arg;
  m.doc() = "Compiled kernels of singe. Use singe.kernels, which checks what it passes on.";
  m.def("accumulate_cpu", &accumulate_cpu, arg("score"), arg("grad"), arg("weight"), arg("omega"),
        arg("S"), arg("C"), arg("K"), arg("dtype"), arg("norm"), arg("num_threads"));
  m.def("accumulate_cuda", &accumulate_cuda, arg("score"), arg("grad"), arg("weight"),
        arg("omega"), arg("S"), arg("C"), arg("K"), arg("dtype"), arg("norm"), arg("device"),
        arg("stream"));
  m.def("cuda_device_count", &cuda_device_count, "Devices, 0 without a driver; never raises.");
  m.def("cuda_driver_version", &cuda_driver_version,
        "Newest CUDA that the driver knows, 13000 for 13.0; 0 without a driver.");
  m.def("cuda_problem", &cuda_problem, arg("device"),
        "Why this device cannot run the kernels, or an empty string.");
  m.def("build_info", &build_info);
}
