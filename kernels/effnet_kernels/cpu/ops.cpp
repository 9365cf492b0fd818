// Registers torch.ops.effnet_cpu. Each op has the arguments and results of the function of that name in the headers.
#include <torch/library.h>

#include "normalization.h"
#include "products.h"

TORCH_LIBRARY(effnet_cpu, m) {
  using namespace effnet;
  m.def("moments(Tensor x) -> Tensor", &moments);
  m.def("merge_moments(Tensor moments, float eps, bool final) -> Tensor", &merge_moments);
  m.def(
      "normalize(Tensor x, Tensor stats, Tensor weight, Tensor bias, Tensor? residual, Tensor? sample_scale, "
      "bool activation) -> Tensor",
      &normalize);
  m.def(
      "grad_sums(Tensor dy, Tensor x, Tensor stats, Tensor weight, Tensor bias, Tensor? sample_scale, "
      "bool activation) -> Tensor",
      &grad_sums);
  m.def(
      "grad_apply(Tensor dy, Tensor x, Tensor stats, Tensor weight, Tensor bias, Tensor? sample_scale, Tensor sums, "
      "bool activation) -> Tensor",
      &grad_apply);
  m.def("squeeze(Tensor x, Tensor stats, Tensor weight, Tensor bias) -> Tensor", &squeeze);
  m.def("excite(Tensor x, Tensor stats, Tensor weight, Tensor bias, Tensor gate) -> Tensor", &excite);
  m.def("five_sums(Tensor? dy, Tensor x, Tensor stats, Tensor weight, Tensor bias) -> Tensor", &five_sums);
  m.def(
      "apply_sums(Tensor? dy, Tensor x, Tensor stats, Tensor weight, Tensor bias, Tensor? gate, Tensor dpool, "
      "Tensor sums) -> Tensor",
      &apply_sums);
  m.def("gate_forward(Tensor pool, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> (Tensor, Tensor)", &gate_forward);
  m.def(
      "gate_backward(Tensor five, Tensor gate, Tensor pool, Tensor hidden, Tensor w1, Tensor w2, int hw) -> Tensor[]",
      &gate_backward);
  m.def("conv_moments(Tensor x, Tensor weight) -> (Tensor, Tensor)", &conv_moments);
  m.def(
      "excite_conv_moments(Tensor d, Tensor stats, Tensor weight, Tensor bias, Tensor gate, Tensor project) -> "
      "(Tensor, Tensor)",
      &excite_conv_moments);
  m.def(
      "project_backward(Tensor dout, Tensor p, Tensor stats3, Tensor weight3, Tensor bias3, Tensor? sample_scale, "
      "Tensor sums, Tensor project, Tensor d, Tensor stats, Tensor weight, Tensor bias, Tensor gate) -> "
      "(Tensor, Tensor, Tensor)",
      &project_backward);
  m.def(
      "expand_backward(Tensor dz, Tensor e, Tensor stats, Tensor weight, Tensor bias, Tensor sums, Tensor x, "
      "Tensor expand, Tensor? residual) -> (Tensor, Tensor)",
      &expand_backward);
}
