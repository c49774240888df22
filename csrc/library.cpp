// Every schema of the package, and nothing else. The kernels register themselves per dispatch key
// (csrc/cpu, csrc/cuda); fake kernels, autograd and autocast are in mnops/ops, one file an op.
//
// (mean, var, gamma, beta, eps, act) is the pending norm of x: z = act((x - mean) * rstd * gamma + beta).
// Forward ops return the raw output y and, if `measure`, the mean and biased variance of y per channel.
#include <torch/csrc/stable/library.h>

#define PENDING "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, str act"
#define MID_PENDING "Tensor? mid_mean, Tensor? mid_var, Tensor? mid_gamma, Tensor? mid_beta, float mid_eps, str mid_act"
#define INCOMING "Tensor g, Tensor? g_mean, Tensor? g_var, Tensor y, Tensor mean_y"
#define MEASURED "(Tensor y, Tensor mean_y, Tensor var_y)"
#define CONV_GRADS "(Tensor dx, Tensor dweight, Tensor dmean, Tensor dvar, Tensor dgamma, Tensor dbeta)"
#define NORM_GRADS "(Tensor dx, Tensor dmean, Tensor dvar, Tensor dgamma, Tensor dbeta)"
#define DEPTHWISE_GEOMETRY "int[] stride, int[] padding, int[] dilation"
#define STEM_GEOMETRY "int[] stride, int[] padding"

STABLE_TORCH_LIBRARY(mnops, m) {
  m.def("depthwise_conv2d(Tensor x, Tensor weight, " PENDING ", " DEPTHWISE_GEOMETRY ", bool measure) -> " MEASURED);
  m.def("depthwise_conv2d_backward(" INCOMING ", Tensor x, Tensor weight, " PENDING ", " DEPTHWISE_GEOMETRY
        ", bool need_input, bool need_weight) -> " CONV_GRADS);

  m.def("pointwise_conv2d(Tensor x, Tensor weight, " PENDING ", bool measure) -> " MEASURED);
  m.def("pointwise_conv2d_backward(" INCOMING ", Tensor x, Tensor weight, " PENDING
        ", bool need_input, bool need_weight) -> " CONV_GRADS);

  m.def("stem_conv2d(Tensor x, Tensor weight, " PENDING ", " STEM_GEOMETRY ", bool measure) -> " MEASURED);
  m.def("stem_conv2d_backward(" INCOMING ", Tensor x, Tensor weight, " PENDING ", " STEM_GEOMETRY
        ", bool need_input, bool need_weight) -> " CONV_GRADS);

  // Inference only: the pending norm `mid` is that of the depthwise result, which is never stored.
  m.def("separable_conv2d(Tensor x, Tensor depthwise_weight, Tensor weight, " PENDING ", " MID_PENDING ", " DEPTHWISE_GEOMETRY
        ") -> Tensor");
  // Inference only: layers one after another, written down as mnops/ops/run_layers.py does it.
  m.def("run_layers(Tensor x, Tensor[] others, Tensor[] tensors, float[] eps, int[] layers, "
        "int[] results) -> Tensor[]");

  // A pointwise weight as the products of such a dtype want it, for run_layers to take in place of packing it at every call.
  m.def("pack_pointwise(Tensor weight) -> Tensor");

  m.def("norm_act(Tensor x, " PENDING ", Tensor? residual=None) -> Tensor");  // z + residual
  m.def("norm_act_backward(Tensor g, Tensor x, " PENDING ") -> " NORM_GRADS);

  m.def("norm_act_pool(Tensor x, " PENDING ") -> Tensor");
  m.def("norm_act_pool_backward(Tensor g, Tensor x, " PENDING ") -> " NORM_GRADS);

  // running += momentum * (batch - running), in place; the batch's variance times `unbias`. On the CPU only, unchecked.
  m.def("update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, float unbias) "
        "-> ()");

  // The memory of results on the CPU (csrc/cpu/memory.h): whether it is kept from now on, returning what was; its release.
  m.def("keep_memory(bool on) -> bool");
  m.def("empty_cache() -> ()");
}
