// The extension module fused_adamw._C: its classes, and the launches on CUDA.
#include "launch_cpu.h"
#include "names.h"
#include "tables.h"
#include "threads_cpu.h"
#include "watch.h"

#if defined(FUSED_ADAMW_CUDA)
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fused_adamw {
namespace {

#if defined(FUSED_ADAMW_CUDA)
// fused_adamw.gpu.Kernels, launched on the current stream of the current device.
class CudaKernels {
public:
  // contract.Variant, without a look at its ema: every kernel steps averages, of rows that have one.
  CudaKernels(at::Device device, const std::string& rule, at::ScalarType p, at::ScalarType g,
              at::ScalarType state, const std::string& master, bool stochastic,
              const std::optional<at::ScalarType>&, bool measured)
      : variant_{rule_of(rule),     format_of(p), format_of(g), format_of(state),
                 master_of(master), stochastic,   measured} {
    TORCH_CHECK_NOT_IMPLEMENTED(
        has_cuda(variant_),
        "backend='cuda' steps parameters with a master, stochastic rounding or int8 moments ",
        "where gradients are float32 or of the parameter's dtype (with statistics=, cautious=, ",
        "first_moment=False and in AdaBound, of that alone) ", "and moments are not float16; here they are ",
        at::toString(g), " and ", at::toString(state),
        ": convert them, or use backend='triton', which takes any mix");
    const c10::DeviceGuard guard(device);
    check(check_cuda(variant_));
  }

  void step(const at::Tensor& rows, const at::Tensor& chunks, int32_t chunk, const at::Tensor& scalars,
            const at::Tensor& factor, const std::optional<at::Tensor>& sums, const py::tuple& given) const {
    GivenScalars numbers{!given.empty(), {}};
    for (size_t i = 0; i < given.size(); ++i)
      numbers.rows[i / SCALARS].x[i % SCALARS] = given[i].cast<float>();
    check(step_cuda(variant_, tables(rows, chunks, chunk), scalars.const_data_ptr<float>(),
                    factor.const_data_ptr<float>(), sums ? sums->mutable_data_ptr<double>() : nullptr,
                    numbers, stream()));
  }

  void sum_squares(const at::Tensor& rows, const at::Tensor& chunks, int32_t chunk,
                   const at::Tensor& sums) const {
    check(sum_squares_cuda(variant_, tables(rows, chunks, chunk), sums.mutable_data_ptr<double>(), stream()));
  }

  void totals(const at::Tensor& sums, const at::Tensor& bounds, const std::optional<at::Tensor>& found,
              const at::Tensor& totals, const at::Tensor& flag) const {
    check(totals_cuda(sums.const_data_ptr<double>(), bounds.const_data_ptr<int64_t>(), totals.numel(),
                      found ? found->const_data_ptr<float>() : nullptr, totals.mutable_data_ptr<double>(),
                      flag.mutable_data_ptr<float>(), stream()));
  }

  void factor(const at::Tensor& sums, const py::tuple& asked, const at::Tensor& factor,
              const std::optional<at::Tensor>& norm) const {
    check(factor_cuda(sums.const_data_ptr<double>(), sums.numel(), clipping_of(asked),
                      factor.mutable_data_ptr<float>(), norm ? norm->mutable_data_ptr<float>() : nullptr,
                      stream()));
  }

  void scalars(const at::Tensor& hyper, const at::Tensor& rates, const at::Tensor& steps,
               const at::Tensor& factor, const at::Tensor& scalars) const {
    check(scalars_cuda(variant_, hyper.const_data_ptr<double>(), rates.const_data_ptr<int64_t>(),
                       steps.const_data_ptr<int64_t>(), steps.size(0), factor.const_data_ptr<float>(),
                       scalars.mutable_data_ptr<float>(), stream()));
  }

private:
  static Tables tables(const at::Tensor& rows, const at::Tensor& chunks, int32_t chunk) {
    return {rows.const_data_ptr<int64_t>(), chunks.const_data_ptr<int32_t>(), chunks.size(0), chunk};
  }
  static void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
  static void check(const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA error: ") + error);
  }
  const Variant variant_;
};
#endif

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const char* const* name = cpu_isas(); *name; ++name) names.emplace_back(*name);
  return names;
}

void use_cpu_isa(const std::string& name) {
  for (int i = 0; cpu_isas()[i]; ++i)
    if (name == cpu_isas()[i]) return void(isa = i);
  std::string runnable;
  for (const std::string& other : isa_names()) runnable += (runnable.empty() ? "" : ", ") + other;
  throw py::value_error("this CPU cannot run " + name + ", only " + runnable);
}

}  // namespace
}  // namespace fused_adamw

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fused_adamw;
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::dict&, const py::list&, const py::object&, const std::string&,
                    py::object, const Watch*,
                    const std::optional<std::vector<std::pair<size_t, Py_ssize_t>>>&>())
      .def("poll", &Watch::poll)
      .def("scalar_rows", &Watch::scalar_rows)
      .def("advance", &Watch::advance)
      .def("device_hypers", &Watch::device_hypers)
      .def("update", &update)
      .def("upload", &upload)
      .def("any_live", &Watch::any_live)
      .def("scalars_of", &Watch::scalars_of);
  py::class_<CpuStep>(m, "CpuStep")
      .def(py::init<Watch&, const py::list&>(), py::keep_alive<1, 2>())
      .def("prepare_step", &CpuStep::prepare_step)
      .def("step", &CpuStep::step)
      .def("run", &CpuStep::run)
      .def_property_readonly("parts", &CpuStep::parts)
      .def("sum_squares", &CpuStep::sum_squares)
      .def("squares", &CpuStep::squares)
      .def("keep", &CpuStep::keep)
      .def("totals", &CpuStep::totals)
      .def("factor", &CpuStep::factor);
#if defined(FUSED_ADAMW_CUDA)
  py::class_<CudaKernels>(m, "CudaKernels")
      .def(py::init<at::Device, const std::string&, at::ScalarType, at::ScalarType, at::ScalarType,
                    const std::string&, bool, const std::optional<at::ScalarType>&, bool>())
      .def("step", &CudaKernels::step)
      .def("sum_squares", &CudaKernels::sum_squares)
      .def("totals", &CudaKernels::totals)
      .def("factor", &CudaKernels::factor)
      .def("scalars", &CudaKernels::scalars);
#endif
  m.def("cpu_isas", &isa_names);
  m.def("use_cpu_isa", &use_cpu_isa);
  m.def("after_fork", [] { forked = true; });
}
