// Registers the depthwise convolution in torch.ops.effnet_cpu. A separate file, since it takes longest to compile.
#include <torch/library.h>

#include "depthwise.h"

namespace effnet {

std::tuple<Tensor, Tensor, Tensor> depthwise_backward_op(
    const Tensor& g, const Tensor& x, const Tensor& taps, int64_t stride, at::IntArrayRef padding,
    const std::optional<Tensor>& stats, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  std::optional<Norm> norm;
  if (stats) norm.emplace(*stats, *weight, *bias);
  return depthwise_backward({g}, x, taps, stride, padding, norm ? &*norm : nullptr);
}

// As depthwise_backward, but computes the gradient at the convolution's output d from dy behind the gate.
std::tuple<Tensor, Tensor, Tensor> gated_depthwise_backward(
    const Tensor& dy, const Tensor& d, const Tensor& stats2, const Tensor& weight2, const Tensor& bias2,
    const Tensor& gate, const Tensor& dpool, const Tensor& sums2, const Tensor& x, const Tensor& taps, int64_t stride,
    at::IntArrayRef padding, const std::optional<Tensor>& stats, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias) {
  std::optional<Norm> norm;
  if (stats) norm.emplace(*stats, *weight, *bias);
  const Norm norm2(stats2, weight2, bias2);
  const GradApply apply(norm2, sums2);
  const OutputGradient gradient{dy, &d, &apply, data<float>(gate), data<float>(dpool)};
  return depthwise_backward(gradient, x, taps, stride, padding, norm ? &*norm : nullptr);
}

}  // namespace effnet

TORCH_LIBRARY_FRAGMENT(effnet_cpu, m) {
  using namespace effnet;
  m.def(
      "depthwise_forward(Tensor x, Tensor taps, int stride, int[] padding, Tensor? stats, Tensor? weight, "
      "Tensor? bias, bool moments) -> (Tensor, Tensor)",
      &depthwise_forward);
  m.def(
      "depthwise_backward(Tensor g, Tensor x, Tensor taps, int stride, int[] padding, Tensor? stats, Tensor? weight, "
      "Tensor? bias) -> (Tensor, Tensor, Tensor)",
      &depthwise_backward_op);
  m.def(
      "gated_depthwise_backward(Tensor dy, Tensor d, Tensor stats2, Tensor weight2, Tensor bias2, Tensor gate, "
      "Tensor dpool, Tensor sums2, Tensor x, Tensor taps, int stride, int[] padding, Tensor? stats, Tensor? weight, "
      "Tensor? bias) -> (Tensor, Tensor, Tensor)",
      &gated_depthwise_backward);
}
