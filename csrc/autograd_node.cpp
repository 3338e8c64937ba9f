// The derivative of the ops as an autograd node in C++. libtorch's stable ABI has no nodes, so this is a library of its own,
// built against one version of torch and loaded with no other; where it is missing, dlb_fast/ops.py does the same in Python
// and pays for it with the time of a small kernel, twice: at the call and in backward.
//
// `last_batch_node` and `last_batch_roll_node` take what `last_batch` and `last_batch_roll` take but need_grad, and return
// what they return but the gradient, which the node keeps; where no gradient is wanted they make neither. Boxed: the
// arguments travel as they came.
#include <torch/library.h>

#include "autograd_node.h"
#include "last_batch_schema.h"

namespace dlb_fast {
namespace {

template <bool roll>
void with_node(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const size_t arguments = handle.schema().arguments().size();
  const Tensor logits = (*stack)[stack->size() - arguments].toTensor();
  auto [loss, parts] = differentiable<roll>(logits, stack);
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
