// The Python face of the extension; the only file that knows pybind11.
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>

#include "engine.h"
#include "gradients.h"
#include "self_check.h"

namespace py = pybind11;
using namespace fastclip;

namespace {

py::object wrap(const at::Tensor& tensor) {
  if (!tensor.defined()) return py::none();
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

Rules::Id rule_named(const std::string& name) {
  std::optional<Rules::Id> rule;
  Rules::find([&](auto tag) { return name == decltype(tag)::Rule::kName; }, [&](Rules::Id id) { rule.emplace(id); });
  if (!rule) raise(PyExc_ValueError, "no such rule: ", name);
  return *rule;
}

// Each rule as fastclip/plain/rules.py has it: (name, names of the state arrays, name of the scalar or None, whether it
// counts steps, name of the momentum or None, whether its first step fills the states, whether max_change can limit
// it).
py::list rules() {
  py::list all;
  Rules::each([&](auto tag) {
    using R = typename decltype(tag)::Rule;
    py::list states;
    for (const StateArray& state : R::kStates) states.append(state.name);
    const py::object scalar = R::kScalar.name ? py::object(py::str(R::kScalar.name)) : py::none();
    py::object momentum = py::none();
    for (const StateArray& state : R::kStates) {
      if (state.is_momentum) momentum = py::str(state.name);
    }
    all.append(py::make_tuple(R::kName, py::tuple(states), scalar, R::kCountsSteps, momentum, R::kFilledByFirstStep,
                              R::kLimitsChange));
  });
  return all;
}

std::optional<NotCovered> clip_grad_value(Engine& engine, const py::list& params, const py::object& clip_value) {
  double low, high;
  read_clip_value(clip_value.ptr(), "", &low, &high);
  return engine.clip_grads(params.ptr(), low, high, {});
}

std::optional<NotCovered> clip_grad_norm(Engine& engine, const py::list& params, const py::object& max_norm,
                                         const py::object& norm_type) {
  const NormClip clip = read_norm_clip(max_norm.ptr(), norm_type.ptr(), "");
  return engine.clip_grads(params.ptr(), -HUGE_VAL, HUGE_VAL, clip);
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

  py::class_<NotCovered>(module, "NotCovered")
      .def_property_readonly(
          "reason",
          [](const NotCovered& why_not) { return py::reinterpret_borrow<py::object>(why_not.reason.words().object); })
      .def_property_readonly("misplaced", [](const NotCovered& why_not) {
        py::list params;
        for (const Held& param : why_not.misplaced) params.append(py::handle(param.object));
        return params;
      });

  py::class_<Engine>(module, "Engine")
      .def(py::init([](const std::string& rule, const py::object& reduction_of, const py::object& total_measure,
                       bool beyond) {
             return std::make_unique<Engine>(rule_named(rule),
                                             Ranks{Held(reduction_of.ptr()), Held(total_measure.ptr()), beyond});
           }),
           py::arg("rule"), py::arg("reduction_of"), py::arg("total_measure"), py::arg("beyond") = false)
      .def("check_group",
           [](const Engine& engine, const py::object& group, Py_ssize_t index) { engine.read(group.ptr(), index); })
      .def("step",
           [](Engine& engine, const py::object& groups, const py::object& state, const py::object& grad_scale,
              const py::object& found_inf, const py::object& grad_factor) {
             return engine.step(groups.ptr(), state.ptr(), grad_scale.ptr(), found_inf.ptr(), grad_factor.ptr());
           })
      .def("warn_of_undone", [](Engine& engine, const py::str& param,
                                int stack_level) { engine.warn_of_undone(param.ptr(), stack_level); })
      .def("clip_grad_value_", clip_grad_value)
      .def("clip_grad_norm_", clip_grad_norm)
      .def("total_norm", [](const Engine& engine) { return wrap(engine.total_norm()); })
      .def("clip_stats",
           [](const Engine& engine) {
             const Engine::ClipStats stats = engine.clip_stats();
             return py::make_tuple(wrap(stats.total_norm), wrap(stats.coefficient), wrap(stats.clamped_fraction),
                                   wrap(stats.skipped), wrap(stats.change), wrap(stats.max_norm),
                                   wrap(stats.skip_norm));
           })
      .def("measures_by_parameter",
           [](const Engine& engine) {
             const auto [measures, norm] = engine.measures_by_parameter();
             return py::make_tuple(wrap(measures), norm == Norm::inf ? HUGE_VAL : 2.0);
           })
      .def("skipped_steps", [](const Engine& engine) { return wrap(engine.skipped_steps()); });

  py::class_<Gradients>(module, "Gradients")
      .def(py::init([](const py::list& params) { return std::make_unique<Gradients>(params.ptr()); }))
      .def("are_those_of",
           [](const Gradients& gradients, const py::list& groups) { return gradients.are_those_of(groups.ptr()); })
      .def("changed_in",
           [](const Gradients& gradients, const py::list& groups) -> py::object {
             const Gradients::Change change = gradients.changed_in(groups.ptr());
             if (change.gone) return py::none();
             return py::make_tuple(change.joined, change.group, change.index);
           })
      .def("has", [](const Gradients& gradients, const py::object& param) { return gradients.has(param.ptr()); });

  // Whether a profiler, or anything else that records torch's operations, is on.
  module.def("is_recording", [] { return at::hasCallbacks(); });
  module.def("steps_taken", &Engine::steps_taken);
  module.def("clip_bounds", clip_bounds);
  module.def("rules", rules);
  module.def("cpu_capability", cpu::capability);

  module.def("misread", [](const py::object& tensor, uintptr_t address, int64_t numel, std::vector<int64_t> sizes,
                           std::vector<int64_t> strides, const py::object& dtype, bool is_cpu, bool is_ordinary,
                           bool is_contiguous, uintptr_t data, const py::object& grad, int64_t version) {
    return misread({tensor.ptr(), address, numel, std::move(sizes), std::move(strides), dtype.ptr(), is_cpu,
                    is_ordinary, is_contiguous, data, grad.ptr(), version});
  });
  module.def("bump_version", [](const py::object& tensor) { bump_version(tensor.ptr()); });
}
