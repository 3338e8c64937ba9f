// A call of `last_batch_roll` that differs from the one before in its tensors alone, from Python and without the way there:
// torch's parser of arguments, which looks at all 24 of them, and a second pass through the dispatcher for the node. Both cost
// little when their code is warm; between two steps of a training loop they are cold and take as long as half the rows of a
// small batch.
//
// `settled_call(options, gradient, DeviceContext)` makes a function of (logits, buffer, slots, ids, num_old, target)
// that returns (loss, parts), or with `gradient` (loss, parts, grad) without a node, or None where a call needs the ordinary way:
// a subclass of Tensor, or a mode of torch (functorch, tracing, dispatch and function modes, inference) that wants to see it.
// A default device is such a mode, which has nothing to say here: its class is the third argument.
// A library of its own, because it belongs to one Python as well as to one version of torch; its name carries both, the
// module's the Python's tag (DLB_FAST_PYTHON, the 311 of cpython-311).
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <exception>
#include <memory>
#include <optional>
#include <vector>

#include "autograd_node.h"

namespace dlb_fast {
namespace {

struct Settled {
  std::vector<c10::IValue> options;  // what follows the target, up to need_grad
  bool gradient;
  PyObject* device_context;
};
constexpr const char* capsule_name = "dlb_fast.settled";
constexpr Py_ssize_t call_arguments = 6;

// Nothing that torch puts between a call and its kernel is switched on, but autocast and default devices.
bool nobody_listens(const Settled& settled) {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  if (keys.included_ - c10::autocast_dispatch_keyset != c10::default_included_set) return false;
  if ((keys.excluded_ | c10::autocast_dispatch_keyset) != (c10::default_excluded_set | c10::autocast_dispatch_keyset)) return false;
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t i = 0; i < Modes::stack_len(); ++i)
    if (reinterpret_cast<PyObject*>(Py_TYPE(Modes::get_stack_at(i)->ptr(getPyInterpreter()))) != settled.device_context) return false;
  return true;
}

// A tensor or None of a call, as the op takes it; nothing where it is something else or carries a forward derivative.
bool push(PyObject* object, bool or_none, torch::jit::Stack& stack) {
  if (or_none && object == Py_None) {
    stack.emplace_back();
    return true;
  }
  if (!THPVariable_CheckExact(object)) return false;
  const Tensor& tensor = THPVariable_Unpack(object);
  if (tensor._fw_grad(/*level=*/0).defined()) return false;
  stack.emplace_back(tensor);
  return true;
}

class WithoutInterpreterLock {
 public:
  WithoutInterpreterLock() : state_(PyEval_SaveThread()) {}
  ~WithoutInterpreterLock() { PyEval_RestoreThread(state_); }
  WithoutInterpreterLock(const WithoutInterpreterLock&) = delete;
  WithoutInterpreterLock& operator=(const WithoutInterpreterLock&) = delete;

 private:
  PyThreadState* state_;
};

std::array<Tensor, 3> computed(const Settled& settled, const Tensor& logits, torch::jit::Stack& stack) {
  const WithoutInterpreterLock released;
  if (!settled.gradient) {
    auto [loss, parts] = differentiable<true>(logits, &stack);
    return {std::move(loss), std::move(parts), Tensor()};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  std::array<Tensor, 3> results = run<true>(&stack, true);
  if (logits.scalar_type() == at::kHalf)  // stored multiplied by a power of two
    scale(results[2], at::ones({}, results[1].options()), results[1]);
  return results;
}

PyObject* packed(std::array<Tensor, 3>& results, Py_ssize_t count) {
  PyObject* tuple = PyTuple_New(count);
  if (!tuple) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* tensor = THPVariable_Wrap(std::move(results[i]));
    if (!tensor || PyTuple_SetItem(tuple, i, tensor) != 0) {
      Py_DECREF(tuple);
      return nullptr;
    }
  }
  return tuple;
}

// A refusal of the op sends the caller the ordinary way, whose words are better; what a hook of Python raised stays what it is.
template <typename F>
PyObject* guarded(const F& work) {
  try {
    return work();
  } catch (python_error& error) {
    error.restore();
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  if (count != call_arguments) {
    PyErr_Format(PyExc_TypeError, "settled call: expected %zd arguments, got %zd", call_arguments, count);
    return nullptr;
  }
  const auto* settled = static_cast<const Settled*>(PyCapsule_GetPointer(self, capsule_name));
  if (!settled) return nullptr;
  return guarded([&]() -> PyObject* {
    torch::jit::Stack stack;
    stack.reserve(call_arguments + settled->options.size() + 1);
    bool known = nobody_listens(*settled);
    for (Py_ssize_t i = 0; known && i < 4; ++i) known = push(given[i], i == 3, stack);
    known = known && THPVariable_Unpack(given[0]).device() == THPVariable_Unpack(given[1]).device();
    if (known) {
      const long long num_old = PyLong_AsLongLong(given[4]);
      if (num_old == -1 && PyErr_Occurred()) return nullptr;
      stack.emplace_back(static_cast<int64_t>(num_old));
      known = push(given[5], true, stack);
    }
    if (!known) {
      Py_INCREF(Py_None);
      return Py_None;
    }
    stack.insert(stack.end(), settled->options.begin(), settled->options.end());
    std::array<Tensor, 3> results = computed(*settled, THPVariable_Unpack(given[0]), stack);
    return packed(results, settled->gradient ? 3 : 2);
  });
}

PyMethodDef call_definition = {"settled_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
                               "(logits, buffer, slots, ids, num_old, target)"};

// A number of the options; a bool is an integer to Python and none of these.
std::optional<c10::IValue> number(PyObject* object) {
  if (object == Py_None) return c10::IValue();
  if (PyFloat_Check(object)) return c10::IValue(PyFloat_AsDouble(object));
  if (PyLong_Check(object) && !PyBool_Check(object)) return c10::IValue(static_cast<int64_t>(PyLong_AsLongLong(object)));
  return std::nullopt;
}

PyObject* make(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(given[0])) {
    PyErr_SetString(PyExc_TypeError, "settled_call: expected (options, gradient, DeviceContext), a tuple, a bool and a class");
    return nullptr;
  }
  return guarded([&]() -> PyObject* {
    auto settled = std::make_unique<Settled>();
    settled->gradient = PyObject_IsTrue(given[1]) == 1;
    settled->device_context = given[2];  // compared with, never used
    // The dispatcher trusts a stack that comes from C++.
    const auto& arguments = c10::Dispatcher::singleton().findSchemaOrThrow("dlb_fast::last_batch_roll", "").schema().arguments();
    const auto expected = static_cast<Py_ssize_t>(arguments.size()) - call_arguments - 1;
    if (PyTuple_Size(given[0]) != expected) {
      PyErr_Format(PyExc_TypeError, "settled_call: expected %zd options, got %zd", expected, PyTuple_Size(given[0]));
      return nullptr;
    }
    for (Py_ssize_t i = 0; i < expected; ++i) {
      const std::optional<c10::IValue> option = number(PyTuple_GetItem(given[0], i));
      if (PyErr_Occurred()) return nullptr;
      const c10::Argument& argument = arguments[call_arguments + i];
      if (!option || !option->type()->isSubtypeOf(*argument.type())) {
        PyErr_Format(PyExc_TypeError, "settled_call: options[%zd], %s, has another type", i, argument.name().c_str());
        return nullptr;
      }
      settled->options.push_back(*option);
    }
    PyObject* capsule = PyCapsule_New(settled.get(), capsule_name, [](PyObject* self) {
      delete static_cast<Settled*>(PyCapsule_GetPointer(self, capsule_name));
    });
    if (!capsule) return nullptr;
    settled.release();
    PyObject* function = PyCFunction_NewEx(&call_definition, capsule, nullptr);
    Py_DECREF(capsule);
    return function;
  });
}

PyMethodDef methods[] = {
    {"settled_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(make)), METH_FASTCALL,
     "settled_call(options, gradient, DeviceContext): a function of (logits, buffer, slots, ids, num_old, target)"},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "settled_call", "See csrc/settled_call.cpp.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace dlb_fast

#define DLB_JOIN(a, b) a##b
#define DLB_INIT(tag) DLB_JOIN(PyInit_settled_call_, tag)
PyMODINIT_FUNC DLB_INIT(DLB_FAST_PYTHON)() { return PyModule_Create(&dlb_fast::definition); }
