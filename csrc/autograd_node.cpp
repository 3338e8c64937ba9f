// The derivative of the ops as an autograd node in C++. libtorch's stable ABI has no nodes, so this is a library of its own,
// built against one version of torch and loaded with no other; where it is missing, dlb_fast/ops.py does the same in Python
// and pays for it with the time of a small kernel, twice: at the call and in backward.
//
// `last_batch_node` and `last_batch_roll_node` take what `last_batch` and `last_batch_roll` take but need_grad, and return
// what they return but the gradient, which the node keeps. Boxed: the arguments travel as they came.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "last_batch_schema.h"

namespace dlb_fast {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A gradient that is no function of anything: asked for its derivative, it says so in the words of torch's
// once_differentiable instead of giving none.
struct Once : torch::autograd::Function<Once> {
  static Tensor forward(AutogradContext*, const Tensor& grad) { return grad.view_as(grad); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "trying to differentiate twice a function that was marked with @once_differentiable");
  }
};

// Looking costs nothing on the CPU, and spares the op's call. float16 gradients are stored enlarged.
bool leaves_as_it_is(const Tensor& upstream, const Tensor& grad) {
  if (!grad.is_cpu() || upstream.dim() > 0 || grad.scalar_type() == at::kHalf) return false;
  if (upstream.scalar_type() == at::kFloat) return *upstream.const_data_ptr<float>() == 1.0f;
  return upstream.scalar_type() == at::kDouble && *upstream.const_data_ptr<double>() == 1.0;
}

void scale(const Tensor& grad, const Tensor& upstream, const Tensor& parts) {
  static const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow("dlb_fast::scale_grad_", "");
  const at::AutoDispatchBelowADInplaceOrView below;
  torch::jit::Stack stack{grad, upstream, parts};
  op.callBoxed(stack);
}

struct LastBatchNode : torch::autograd::Function<LastBatchNode> {
  // The loss alone: `parts` has no derivative, and marking it so is more than compiled autograd takes.
  template <typename Run>
  static Tensor forward(AutogradContext* ctx, const Tensor&, const Run& run) {
    const auto [loss, parts, grad] = run();
    ctx->save_for_backward({grad, parts});
    ctx->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    const Tensor& upstream = upstreams[0];
    if (!upstream.defined()) return {Tensor(), Tensor()};
    const variable_list saved = ctx->get_saved_variables();
    const bool create_graph = at::GradMode::is_enabled();
    Tensor grad = saved[0];
    {
      const at::AutoGradMode none(false);
      // retain_graph=True: the saved gradient has to survive for the next backward.
      if (torch::autograd::get_current_graph_task_keep_graph()) grad = grad.clone();
      if (!leaves_as_it_is(upstream, grad)) scale(grad, upstream, saved[1]);
    }
    if (create_graph) grad = Once::apply(grad.detach().requires_grad_());
    return {grad, Tensor()};
  }
};

template <bool roll>
void with_node(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  static const c10::OperatorHandle op =
      c10::Dispatcher::singleton().findSchemaOrThrow(roll ? "dlb_fast::last_batch_roll" : "dlb_fast::last_batch", "");
  const size_t arguments = handle.schema().arguments().size();
  const Tensor logits = (*stack)[stack->size() - arguments].toTensor();
  Tensor parts;
  Tensor loss = LastBatchNode::apply(logits, [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    stack->emplace_back(true);
    op.callBoxed(*stack);
    std::array<Tensor, 3> results;
    for (size_t i = 3; i-- > 0; stack->pop_back()) results[i] = std::move(stack->back()).toTensor();
    parts = results[1];
    return results;
  });
  stack->emplace_back(std::move(loss));
  stack->emplace_back(std::move(parts));
}

TORCH_LIBRARY_FRAGMENT(dlb_fast, m) {
  m.def("last_batch_node(Tensor logits, Tensor? teacher, " DLB_OPTION_SCHEMA ") -> " DLB_RETURNS_IN_PLACE);
  m.def("last_batch_roll_node(Tensor logits, Tensor(a!) buffer, Tensor(b!) slots, Tensor? ids, int num_old, " DLB_OPTION_SCHEMA
        ") -> " DLB_RETURNS_IN_PLACE);
}

TORCH_LIBRARY_IMPL(dlb_fast, Autograd, m) {
  m.impl("last_batch_node", torch::CppFunction::makeFromBoxedFunction<&with_node<false>>());
  m.impl("last_batch_roll_node", torch::CppFunction::makeFromBoxedFunction<&with_node<true>>());
}

}  // namespace
}  // namespace dlb_fast
