// The node itself, for those who make it: autograd_node.cpp under the dispatcher, settled_call.cpp under Python.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>

#include <array>
#include <utility>

namespace dlb_fast {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A gradient that is no function of anything: asked for its derivative, it says so in the words of torch's
// once_differentiable instead of giving none.
struct Once : torch::autograd::Function<Once> {
  static Tensor forward(AutogradContext*, const Tensor& grad, const Tensor&) { return grad.view_as(grad); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "trying to differentiate twice a function that was marked with @once_differentiable");
  }
};

// It stands between the gradient and what the logits come from: whoever wants a derivative by any of that gets there.
inline Tensor once(const Tensor& grad) {
  const Tensor origin = at::empty({0}, grad.options());
  torch::autograd::impl::set_gradient_edge(origin, torch::autograd::get_current_node()->next_edge(0));
  return Once::apply(grad.detach(), origin);
}

// Looking costs nothing on the CPU, and spares the op's call. float16 gradients are stored multiplied.
inline bool leaves_as_it_is(const Tensor& upstream, const Tensor& grad) {
  if (!grad.is_cpu() || upstream.dim() > 0 || grad.scalar_type() == at::kHalf) return false;
  if (upstream.scalar_type() == at::kFloat) return *upstream.const_data_ptr<float>() == 1.0f;
  return upstream.scalar_type() == at::kDouble && *upstream.const_data_ptr<double>() == 1.0;
}

inline void scale(const Tensor& grad, const Tensor& upstream, const Tensor& parts) {
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
    if (create_graph) grad = once(grad);
    return {grad, Tensor()};
  }
};

// The op itself: its arguments are on the stack but need_grad, its results come off it.
template <bool roll>
std::array<Tensor, 3> run(torch::jit::Stack* stack, bool need_grad) {
  static const c10::OperatorHandle op =
      c10::Dispatcher::singleton().findSchemaOrThrow(roll ? "dlb_fast::last_batch_roll" : "dlb_fast::last_batch", "");
  stack->emplace_back(need_grad);
  op.callBoxed(*stack);
  std::array<Tensor, 3> results;
  for (size_t i = 3; i-- > 0; stack->pop_back()) results[i] = std::move(stack->back()).toTensor();
  return results;
}

// Loss and parts of a call whose arguments but need_grad are on the stack; with a node where a gradient is wanted.
template <bool roll>
std::pair<Tensor, Tensor> differentiable(const Tensor& logits, torch::jit::Stack* stack) {
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::array<Tensor, 3> results = run<roll>(stack, false);
    return {std::move(results[0]), std::move(results[1])};
  }
  Tensor parts;
  Tensor loss = LastBatchNode::apply(logits, [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::array<Tensor, 3> results = run<roll>(stack, true);
    parts = results[1];
    return results;
  });
  return {std::move(loss), std::move(parts)};
}

}  // namespace dlb_fast
