// mnops._C: what is not a tensor op. Build info, CPU capability, the table of kernel variants, and every kernel of
// any built instruction set callable on NumPy arrays: tests and kernel benchmarks need no torch, on emulated CPUs too.
// Arrays are NHWC and C-contiguous; half precision arrays are uint16 bits with dtype "float16" or "bfloat16" given.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "cpu/dispatch.h"
#include "cpu/drivers/depthwise_conv2d.h"
#include "cpu/drivers/norm_act.h"
#include "cpu/drivers/pointwise_conv2d.h"
#include "cpu/drivers/separable_conv2d.h"
#include "cpu/drivers/stem_conv2d.h"

namespace py = pybind11;
using namespace mnops;

namespace {

const Threads one_thread = {1, [](int, const std::function<void(int)>& f) { f(0); }};

template <class T> using Dense = py::array_t<T, py::array::c_style>;

Act parse_act(const std::string& name) {
  const char* names[] = {"none", "relu", "relu6", "hardswish", "silu"};
  for (int i = 0; i < 5; i++)
    if (name == names[i]) return Act(i);
  throw py::value_error("act must be one of none, relu, relu6, hardswish, silu, got " + name);
}

// Storage of the big arrays: fp32 and fp64 by their NumPy dtype, fp16 as NumPy float16, bf16 as NumPy uint16 bits.
DType storage(const py::array& a) {
  if (!(a.flags() & py::array::c_style)) throw py::value_error("arrays must be C-contiguous");
  if (py::isinstance<py::array_t<float>>(a)) return DType::f32;
  if (py::isinstance<py::array_t<double>>(a)) return DType::f64;
  if (a.dtype().kind() == 'f' && a.itemsize() == 2) return DType::f16;
  if (a.dtype().kind() == 'u' && a.itemsize() == 2) return DType::bf16;
  throw py::value_error("x must be float32, float64, float16, or uint16 (the bits of bfloat16)");
}

// The pending norm as keyword arguments: mean, var, gamma, beta (arrays or None), eps, act.
template <class T> struct PendingArrays {
  std::vector<Dense<T>> keep;
  Pending<T> pending;
  PendingArrays(const py::dict& norm, int64_t c) {
    auto vector = [&](const char* name) -> const T* {
      if (!norm.contains(name) || norm[name].is_none()) return nullptr;
      keep.push_back(py::cast<Dense<T>>(norm[name]));
      if (keep.back().size() != c) throw py::value_error(std::string(name) + " must have one element a channel");
      return keep.back().data();
    };
    pending.mean = vector("mean"), pending.var = vector("var"), pending.gamma = vector("gamma"), pending.beta = vector("beta");
    pending.eps = norm.contains("eps") ? py::cast<double>(norm["eps"]) : 1e-5;
    pending.act = parse_act(norm.contains("act") ? py::cast<std::string>(norm["act"]) : "none");
  }
};

template <class F> py::object with_storage(const std::string& isa_name, const py::array& x, F f) {
  const InstructionSet& isa = instruction_set(isa_name);
  const DType type = storage(x);
  return type == DType::f64 ? f(isa.f64, double()) : f(isa.of(type, static_cast<float*>(nullptr)), float());
}

DepthwiseShape depthwise_shape(const py::array& x, const py::array& w, std::pair<int, int> stride, std::vector<int> padding,
                               std::pair<int, int> dilation, int64_t c = -1) {  // c: channels, where they are not x's
  if (x.ndim() != 4 || w.ndim() != 3 || w.shape(0) != (c < 0 ? x.shape(3) : c)) throw py::value_error("x must be (N, H, W, C), weight (C, kh, kw)");
  if (padding.size() != 4) throw py::value_error("padding must be (top, bottom, left, right)");
  DepthwiseShape s{};
  s.n = x.shape(0), s.h = x.shape(1), s.w = x.shape(2), s.c = w.shape(0), s.kh = int(w.shape(1)), s.kw = int(w.shape(2));
  s.sh = stride.first, s.sw = stride.second, s.dh = dilation.first, s.dw = dilation.second;
  s.pad_top = padding[0], s.pad_left = padding[2];
  s.ho = (s.h + padding[0] + padding[1] - s.dh * (s.kh - 1) - 1) / s.sh + 1;
  s.wo = (s.w + padding[2] + padding[3] - s.dw * (s.kw - 1) - 1) / s.sw + 1;
  if (s.n < 1 || s.ho < 1 || s.wo < 1 || s.kh > 64 || s.kw > 64) throw py::value_error("the padded input must hold the kernel");
  return s;
}

py::array like(const py::array& x, std::vector<py::ssize_t> shape) { return py::array(x.dtype(), shape); }

template <class T> py::object none_or(Dense<T>& a, bool given) { return given ? py::object(a) : py::object(py::none()); }

py::object depthwise(const std::string& isa, py::array x, py::array weight, py::dict norm, std::pair<int, int> stride,
                     std::vector<int> padding, std::pair<int, int> dilation, bool measure) {
  return with_storage(isa, x, [&](const auto& kernels, auto zero) -> py::object {
    using T = decltype(zero);
    const auto w = py::cast<Dense<T>>(weight);
    const DepthwiseShape s = depthwise_shape(x, w, stride, padding, dilation);
    const PendingArrays<T> p(norm, s.c);
    py::array y = like(x, {s.n, s.ho, s.wo, s.c});
    Dense<T> mean(s.c), var(s.c);
    depthwise_conv2d<T>(kernels, one_thread, s, x.data(), w.data(), p.pending, y.mutable_data(),
                        measure ? mean.mutable_data() : nullptr, measure ? var.mutable_data() : nullptr);
    return py::make_tuple(y, none_or(mean, measure), none_or(var, measure));
  });
}

// (dx, dweight, dmean, dvar, dgamma, dbeta) from a dict of arrays.
template <class T> struct GradArrays {
  Dense<T> mean, var, gamma, beta;
  explicit GradArrays(int64_t c) : mean(c), var(c), gamma(c), beta(c) {}
  PendingGrads<T> pointers() { return {mean.mutable_data(), var.mutable_data(), gamma.mutable_data(), beta.mutable_data()}; }
};

template <class T> struct OutputArrays {
  Dense<T> g_mean, g_var, mean;
  Output<T> output;
  OutputArrays(const py::array& g, const py::array& y, const py::object& gm, const py::object& gv, const py::object& m, int64_t c) {
    output.g = g.data(), output.y = y.data();
    if (gm.is_none()) return;
    g_mean = py::cast<Dense<T>>(gm), g_var = py::cast<Dense<T>>(gv), mean = py::cast<Dense<T>>(m);
    if (g_mean.size() != c || g_var.size() != c || mean.size() != c) throw py::value_error("g_mean, g_var, mean must have one element a channel");
    output.g_mean = g_mean.data(), output.g_var = g_var.data(), output.mean = mean.data();
  }
};

void same_shape(const py::array& a, std::vector<py::ssize_t> shape, const char* name) {
  bool same = a.ndim() == py::ssize_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); i++) same = a.shape(i) == shape[i];
  if (!same) throw py::value_error(std::string(name) + " does not have the shape that the other arguments give");
}

py::object depthwise_backward(const std::string& isa, py::array g, py::array y, py::object g_mean, py::object g_var,
                              py::object mean_y, py::array x, py::array weight, py::dict norm, std::pair<int, int> stride,
                              std::vector<int> padding, std::pair<int, int> dilation) {
  return with_storage(isa, x, [&](const auto& kernels, auto zero) -> py::object {
    using T = decltype(zero);
    const auto w = py::cast<Dense<T>>(weight);
    const DepthwiseShape s = depthwise_shape(x, w, stride, padding, dilation);
    same_shape(g, {s.n, s.ho, s.wo, s.c}, "g"), same_shape(y, {s.n, s.ho, s.wo, s.c}, "y");
    const PendingArrays<T> p(norm, s.c);
    const OutputArrays<T> out(g, y, g_mean, g_var, mean_y, s.c);
    py::array dx = like(x, {s.n, s.h, s.w, s.c});
    Dense<T> dw({s.c, int64_t(s.kh), int64_t(s.kw)});
    GradArrays<T> grads(s.c);
    depthwise_conv2d_backward<T>(kernels, one_thread, s, out.output, x.data(), w.data(), p.pending, dx.mutable_data(),
                                 dw.mutable_data(), grads.pointers());
    return py::make_tuple(dx, dw, grads.mean, grads.var, grads.gamma, grads.beta);
  });
}

py::object pointwise(const std::string& isa, py::array x, py::array weight, py::dict norm, bool measure,
                     const std::optional<py::array>& gate) {
  return with_storage(isa, x, [&](const auto& kernels, auto zero) -> py::object {
    using T = decltype(zero);
    const auto w = py::cast<Dense<T>>(weight);
    if (x.ndim() != 2 || w.ndim() != 2 || w.shape(1) != x.shape(1)) throw py::value_error("x must be (pixels, C), weight (O, C)");
    const int64_t m = x.shape(0), k = x.shape(1), o = w.shape(0);
    const PendingArrays<T> p(norm, k);
    py::array y = like(x, {m, o});
    Dense<T> mean(o), var(o), factors;
    if (gate) factors = py::cast<Dense<T>>(*gate);
    if (gate && (factors.ndim() != 2 || factors.shape(1) != k || factors.shape(0) < 1 || m % factors.shape(0)))
      throw py::value_error("gate must be (images, C), of equally many pixels each");
    pointwise_conv2d<T>(kernels, one_thread, m, k, o, x.data(), w.data(), p.pending, y.mutable_data(),
                        measure ? mean.mutable_data() : nullptr, measure ? var.mutable_data() : nullptr,
                        gate ? Gate<T>{factors.data(), m / factors.shape(0)} : Gate<T>{});
    return py::make_tuple(y, none_or(mean, measure), none_or(var, measure));
  });
}

py::object pointwise_backward(const std::string& isa, py::array g, py::array y, py::object g_mean, py::object g_var,
                              py::object mean_y, py::array x, py::array weight, py::dict norm) {
  return with_storage(isa, x, [&](const auto& kernels, auto zero) -> py::object {
    using T = decltype(zero);
    const auto w = py::cast<Dense<T>>(weight);
    if (x.ndim() != 2 || w.ndim() != 2 || w.shape(1) != x.shape(1)) throw py::value_error("x must be (pixels, C), weight (O, C)");
    const int64_t m = x.shape(0), k = x.shape(1), o = w.shape(0);
    same_shape(g, {m, o}, "g"), same_shape(y, {m, o}, "y");
    const PendingArrays<T> p(norm, k);
    const OutputArrays<T> out(g, y, g_mean, g_var, mean_y, o);
    py::array dx = like(x, {m, k});
    Dense<T> dw({o, k});
    GradArrays<T> grads(k);
    pointwise_conv2d_backward<T>(kernels, one_thread, m, k, o, out.output, x.data(), w.data(), p.pending,
                                 dx.mutable_data(), dw.mutable_data(), grads.pointers());
    return py::make_tuple(dx, dw, grads.mean, grads.var, grads.gamma, grads.beta);
  });
}

Window stem_window(const py::array& x, const py::array& w, std::pair<int, int> stride, std::vector<int> padding) {
  if (x.ndim() != 4 || w.ndim() != 4 || w.shape(3) != x.shape(3)) throw py::value_error("x must be (N, H, W, C), weight (O, kh, kw, C)");
  if (padding.size() != 4) throw py::value_error("padding must be (top, bottom, left, right)");
  Window s{};
  s.h = x.shape(1), s.w = x.shape(2), s.c = x.shape(3), s.kh = int(w.shape(1)), s.kw = int(w.shape(2));
  s.sh = stride.first, s.sw = stride.second, s.pad_top = padding[0], s.pad_left = padding[2];
  s.ho = (s.h + padding[0] + padding[1] - s.kh) / s.sh + 1, s.wo = (s.w + padding[2] + padding[3] - s.kw) / s.sw + 1;
  if (x.shape(0) < 1 || s.ho < 1 || s.wo < 1) throw py::value_error("the padded input must hold the kernel");
  return s;
}

py::object stem(const std::string& isa, py::array x, py::array weight, py::dict norm, std::pair<int, int> stride,
                std::vector<int> padding, bool measure) {
  return with_storage(isa, x, [&](const auto& kernels, auto zero) -> py::object {
    using T = decltype(zero);
    const auto w = py::cast<Dense<T>>(weight);
    const Window s = stem_window(x, w, stride, padding);
    const int64_t o = w.shape(0);
    const PendingArrays<T> p(norm, s.c);
    py::array y = like(x, {x.shape(0), s.ho, s.wo, o});
    Dense<T> mean(o), var(o);
    stem_conv2d<T>(kernels, one_thread, x.shape(0), s, o, x.data(), w.data(), p.pending, y.mutable_data(),
                   measure ? mean.mutable_data() : nullptr, measure ? var.mutable_data() : nullptr);
    return py::make_tuple(y, none_or(mean, measure), none_or(var, measure));
  });
}

py::object stem_backward(const std::string& isa, py::array g, py::array y, py::object g_mean, py::object g_var, py::object mean_y,
                         py::array x, py::array weight, py::dict norm, std::pair<int, int> stride, std::vector<int> padding,
                         bool need_input) {
  return with_storage(isa, x, [&](const auto& kernels, auto zero) -> py::object {
    using T = decltype(zero);
    const auto w = py::cast<Dense<T>>(weight);
    const Window s = stem_window(x, w, stride, padding);
    const int64_t o = w.shape(0);
    same_shape(g, {x.shape(0), s.ho, s.wo, o}, "g"), same_shape(y, {x.shape(0), s.ho, s.wo, o}, "y");
    const PendingArrays<T> p(norm, s.c);
    const OutputArrays<T> out(g, y, g_mean, g_var, mean_y, o);
    py::array dx = like(x, {x.shape(0), s.h, s.w, s.c});
    Dense<T> dw({o, int64_t(s.kh), int64_t(s.kw), s.c});
    GradArrays<T> grads(s.c);
    stem_conv2d_backward<T>(kernels, one_thread, x.shape(0), s, o, out.output, x.data(), w.data(), p.pending,
                            need_input ? dx.mutable_data() : nullptr, dw.mutable_data(), grads.pointers());
    if (!need_input) return dw;
    return py::make_tuple(dx, dw, grads.mean, grads.var, grads.gamma, grads.beta);
  });
}

py::object separable(const std::string& isa, py::array x, py::array depthwise_weight, py::dict norm, py::dict mid, py::array weight,
                     std::pair<int, int> stride, std::vector<int> padding, std::pair<int, int> dilation,
                     const std::optional<py::array>& expand_weight, py::dict on_x) {
  return with_storage(isa, x, [&](const auto& kernels, auto zero) -> py::object {
    using T = decltype(zero);
    const auto taps = py::cast<Dense<T>>(depthwise_weight), w = py::cast<Dense<T>>(weight);
    Dense<T> first;
    if (expand_weight) first = py::cast<Dense<T>>(*expand_weight);
    if (expand_weight && (x.ndim() != 4 || first.ndim() != 2 || first.shape(1) != x.shape(3)))
      throw py::value_error("expand_weight must be (C, K), with x (N, H, W, K)");
    const DepthwiseShape s = depthwise_shape(x, taps, stride, padding, dilation, expand_weight ? first.shape(0) : -1);
    if (w.ndim() != 2 || w.shape(1) != s.c) throw py::value_error("weight must be (O, C)");
    const PendingArrays<T> p(norm, s.c), q(mid, s.c);
    const PendingArrays<T> before(on_x, x.shape(3));
    const Expand<T> expand{x.shape(3), first.data(), before.pending, nullptr};
    py::array y = like(x, {s.n, s.ho, s.wo, w.shape(0)});
    separable_conv2d<T>(kernels, one_thread, s, w.shape(0), x.data(), p.pending, taps.data(), q.pending, w.data(), y.mutable_data(),
                        expand_weight ? &expand : nullptr);
    return y;
  });
}

template <bool pool>
py::object norm_act_numpy(const std::string& isa, py::array x, py::dict norm, std::optional<py::array> residual) {
  return with_storage(isa, x, [&](const auto& kernels, auto zero) -> py::object {
    using T = decltype(zero);
    if (x.ndim() != 3) throw py::value_error("x must be (N, pixels, C)");
    const PendingArrays<T> p(norm, x.shape(2));
    py::array z = pool ? like(x, {x.shape(0), x.shape(2)}) : like(x, {x.shape(0), x.shape(1), x.shape(2)});
    if (residual) same_shape(*residual, {x.shape(0), x.shape(1), x.shape(2)}, "residual");
    norm_act<T>(kernels, one_thread, x.shape(0), x.shape(1), x.shape(2), pool, x.data(), p.pending,
                residual ? residual->data() : nullptr, z.mutable_data());
    return z;
  });
}

template <bool pool> py::object norm_act_backward_numpy(const std::string& isa, py::array g, py::array x, py::dict norm) {
  return with_storage(isa, x, [&](const auto& kernels, auto zero) -> py::object {
    using T = decltype(zero);
    if (x.ndim() != 3) throw py::value_error("x must be (N, pixels, C)");
    if (pool) same_shape(g, {x.shape(0), x.shape(2)}, "g"); else same_shape(g, {x.shape(0), x.shape(1), x.shape(2)}, "g");
    const PendingArrays<T> p(norm, x.shape(2));
    py::array dx = like(x, {x.shape(0), x.shape(1), x.shape(2)});
    GradArrays<T> grads(x.shape(2));
    norm_act_backward<T>(kernels, one_thread, x.shape(0), x.shape(1), x.shape(2), pool, g.data(), x.data(), p.pending,
                         dx.mutable_data(), grads.pointers());
    return py::make_tuple(dx, grads.mean, grads.var, grads.gamma, grads.beta);
  });
}

py::dict build_info() {
  py::dict d;
#define ENTRY(key, value) d[key] = value;
  MNOPS_BUILD_INFO(ENTRY)
#undef ENTRY
  return d;
}

py::list cpu_capabilities() {
  py::list all;
  for (const Capability& c : capabilities()) {
    py::dict d;
    d["name"] = c.name, d["built"] = c.kernels != nullptr, d["supported"] = c.supported;
    all.append(d);
  }
  return all;
}

template <class T> py::dict variant(const InstructionSet& isa, const char* dtype, const Kernels<T>& k) {
  py::dict d;
  d["instruction_set"] = isa.name, d["dtype"] = dtype, d["lanes"] = k.lanes;
  d["tile"] = py::make_tuple(k.mr, k.nr), d["reason"] = isa.tile_reason;
  return d;
}

py::list kernel_variants() {
  py::list all;
  for (const Capability& c : capabilities())
    if (c.kernels) {
      all.append(variant(*c.kernels, "float32", c.kernels->f32));
      all.append(variant(*c.kernels, "float16", c.kernels->f16));
      all.append(variant(*c.kernels, "bfloat16", c.kernels->bf16));
      all.append(variant(*c.kernels, "float64", c.kernels->f64));
    }
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "mnops without torch: build info, CPU capability, and the CPU kernels on NumPy arrays (NHWC, one thread).";
  m.def("build_info", &build_info, "What this build was made of, as a dict of strings.");
  m.def("cpu_capabilities", &cpu_capabilities, "Instruction sets, best last: name, built, supported by this CPU.");
  m.def("cpu_capability", [] { return instruction_set().name; }, "The instruction set in use (MNOPS_CPU_CAPABILITY forces one).");
  m.def("kernel_variants", &kernel_variants, "Every kernel variant: instruction set, dtype, lanes, tile and its reason.");

  const std::pair<int, int> one{1, 1};
  using py::arg;
  m.def("depthwise_conv2d", &depthwise, arg("instruction_set"), arg("x"), arg("weight"), arg("norm"), arg("stride") = one,
        arg("padding") = std::vector<int>{0, 0, 0, 0}, arg("dilation") = one, arg("measure") = true,
        "x (N, H, W, C), weight (C, kh, kw), norm {mean, var, gamma, beta, eps, act} -> y, mean, var");
  m.def("depthwise_conv2d_backward", &depthwise_backward, arg("instruction_set"), arg("g"), arg("y"), arg("g_mean"), arg("g_var"),
        arg("mean_y"), arg("x"), arg("weight"), arg("norm"), arg("stride") = one,
        arg("padding") = std::vector<int>{0, 0, 0, 0}, arg("dilation") = one, "-> dx, dweight, dmean, dvar, dgamma, dbeta");
  m.def("pointwise_conv2d", &pointwise, arg("instruction_set"), arg("x"), arg("weight"), arg("norm"), arg("measure") = true,
        arg("gate") = py::none(), "x (pixels, C), weight (O, C), gate (images, C) -> y, mean, var");
  m.def("pointwise_conv2d_backward", &pointwise_backward, arg("instruction_set"), arg("g"), arg("y"), arg("g_mean"), arg("g_var"),
        arg("mean_y"), arg("x"), arg("weight"), arg("norm"), "-> dx, dweight, dmean, dvar, dgamma, dbeta");
  m.def("stem_conv2d", &stem, arg("instruction_set"), arg("x"), arg("weight"), arg("norm"), arg("stride") = one,
        arg("padding") = std::vector<int>{0, 0, 0, 0}, arg("measure") = true, "x (N, H, W, C), weight (O, kh, kw, C) -> y, mean, var");
  m.def("stem_conv2d_backward", &stem_backward, arg("instruction_set"), arg("g"), arg("y"), arg("g_mean"), arg("g_var"),
        arg("mean_y"), arg("x"), arg("weight"), arg("norm"), arg("stride") = one, arg("padding") = std::vector<int>{0, 0, 0, 0},
        arg("need_input") = true, "-> dx, dweight, dmean, dvar, dgamma, dbeta; dweight alone without need_input");
  m.def("separable_conv2d", &separable, arg("instruction_set"), arg("x"), arg("depthwise_weight"), arg("norm"), arg("mid"),
        arg("weight"), arg("stride") = one, arg("padding"), arg("dilation") = one,
        arg("expand_weight") = py::none(), arg("on_x") = py::dict(),
        "x (N, H, W, C), depthwise_weight (C, kh, kw), weight (O, C) -> y (N, Ho, Wo, O); with expand_weight (C, K) x is (N, H, W, K)");
  m.def("norm_act", &norm_act_numpy<false>, arg("instruction_set"), arg("x"), arg("norm"), arg("residual") = py::none(),
        "x, residual (N, pixels, C) -> z + residual");
  m.def("norm_act_backward", &norm_act_backward_numpy<false>, arg("instruction_set"), arg("g"), arg("x"), arg("norm"),
        "-> dx, dmean, dvar, dgamma, dbeta");
  m.def("norm_act_pool",
        [](const std::string& isa, py::array x, py::dict norm) { return norm_act_numpy<true>(isa, x, norm, std::nullopt); },
        arg("instruction_set"), arg("x"), arg("norm"), "x (N, pixels, C) -> (N, C)");
  m.def("norm_act_pool_backward", &norm_act_backward_numpy<true>, arg("instruction_set"), arg("g"), arg("x"), arg("norm"),
        "-> dx, dmean, dvar, dgamma, dbeta");
}
