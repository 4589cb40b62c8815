// The Python face of the extension; the only file that knows pybind11.
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "plan.h"

namespace py = pybind11;
using namespace fastclip;

namespace {

py::object wrap(const at::Tensor& tensor) {
  if (!tensor.defined()) return py::none();
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

// None where the kernels did the work; otherwise why they did not.
py::object reason(const std::string& why_not) {
  if (why_not.empty()) return py::none();
  return py::str(why_not);
}

Rule rule_named(const std::string& name) {
  if (name == "sgd") return Rule::sgd;
  if (name == "adam") return Rule::adam;
  raise(PyExc_ValueError, "no such rule: " + name);
}

py::object clip_grad_value(Plan& plan, const py::list& params, const py::object& clip_value) {
  double low, high;
  read_clip_value(clip_value.ptr(), "", &low, &high);
  return reason(plan.clip_grads(params.ptr(), low, high, {}));
}

py::object clip_grad_norm(Plan& plan, const py::list& params, const py::object& max_norm,
                          const py::object& norm_type) {
  const NormClip clip = read_norm_clip(max_norm.ptr(), norm_type.ptr(), "");
  return reason(plan.clip_grads(params.ptr(), -HUGE_VAL, HUGE_VAL, clip));
}

// (low, high) of a value clip, as it acts on gradients of a dtype.
std::pair<double, double> clip_bounds(const py::object& clip_value, const py::object& dtype) {
  const auto scalar_type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
  double low, high;
  read_clip_value(clip_value.ptr(), "", &low, &high);
  if (!has_kernel_dtype(scalar_type)) return {low, high};
  const auto of_gradients = static_cast<DType>(kDTypes[static_cast<size_t>(scalar_type)]);
  return {rounded_bound(of_gradients, low), rounded_bound(of_gradients, high)};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  // For calls into this module alone: a translator of the whole process would come before torch's own.
  py::register_local_exception_translator([](std::exception_ptr exception) {
    try {
      if (exception) std::rethrow_exception(exception);
    } catch (const PythonError&) {
      // Already set.
    } catch (const c10::Error&) {
      torch::translate_exception_to_python(exception);
    } catch (const python_error&) {
      torch::translate_exception_to_python(exception);
    }
  });

  py::class_<Plan>(module, "Plan")
      .def(py::init([](const std::string& rule) { return std::make_unique<Plan>(rule_named(rule)); }), py::arg("rule") = "sgd")
      .def("check_group",
           [](const Plan& plan, const py::object& group, Py_ssize_t index) {
             read_group(group.ptr(), index, plan.rule());
           })
      .def("step",
           [](Plan& plan, const py::object& groups, const py::object& state, const py::object& grad_scale,
              const py::object& found_inf) {
             return reason(plan.step(groups.ptr(), state.ptr(), grad_scale.ptr(), found_inf.ptr()));
           })
      .def("take_misplaced",
           [](Plan& plan) {
             py::list params;
             for (const Held& param : plan.take_misplaced()) params.append(py::handle(param.object));
             return params;
           })
      .def("warn_of_undone", &Plan::warn_of_undone)
      .def("clip_grad_value_", clip_grad_value)
      .def("clip_grad_norm_", clip_grad_norm)
      .def("total_norm", [](const Plan& plan) { return wrap(plan.total_norm()); })
      .def("clip_stats",
           [](const Plan& plan) {
             const Plan::ClipStats stats = plan.clip_stats();
             return py::make_tuple(wrap(stats.total_norm), wrap(stats.coefficient), wrap(stats.clamped_fraction),
                                   wrap(stats.skipped));
           })
      .def("skipped_steps", [](const Plan& plan) { return wrap(plan.skipped_steps()); });

  // Whether a profiler, or anything else that records torch's operations, is on.
  module.def("is_recording", [] { return at::hasCallbacks(); });
  module.def("clip_bounds", clip_bounds);
  module.def("cpu_capability", cpu::capability);
}
