// Layers of a network, for inference, one after another without a step of Python between them: on a small image a call from
// Python takes longer than its kernel. A depthwise convolution, its norm and the pointwise one behind it become one kernel,
// and a pointwise one before them part of it; any other norm is left pending on its tensor until somebody reads that.
#include <array>

#include "cpu/forward.h"
#include "cpu/tensors.h"

namespace mnops {
namespace {

// As mnops/ops/run_layers.py writes them: each layer is its kind, the value that it reads, and up to 9 more. A tensor is an
// index into `tensors`, -1 for none; value i is input i, and from there on what the layers give, in order.
enum Kind : int64_t {
  stem_layer,       // weight, stride, padding
  depthwise_layer,  // weight, stride, padding, dilation
  pointwise_layer,  // weight, the value that gates x (or -1) and how, the packed weight
  norm_layer,       // mean, var, gamma, beta, act
  sum_layer,        // the other value, of the same shape
  pool_layer,       // (N, C, 1, 1)
};
constexpr int64_t ints = 11;
constexpr std::array<const char*, 5> acts{"none", "relu", "relu6", "hardswish", "silu"};

// What makes factors of a squeeze-and-excite's (N, C, 1, 1): index into mnops/reference.py's GATES.
enum Gating : int64_t { sigmoid_gate, hardsigmoid_gate, gatings };

struct Value {
  MaybeTensor x;  // none before it is computed, and after its last reader
  PendingTensors norm{{}, {}, {}, {}, 0, "none"};
  int64_t readers = 0;
  bool pending() const { return norm.mean || norm.act != "none"; }
};

// Whether the expanded tensor, which then is not stored, is large enough for that to pay. (MobileNetV2's blocks, batch 1 and
// 16: 1.1 to 1.5 times as fast on maps of 28 x 28 and more, 0.8 to 1.0 on 14 x 14: rows at the edges are expanded twice.)
bool worth_expanding(const Tensor& x) { return x.size(2) * x.size(3) >= 24 * 24; }

struct Run {
  const std::vector<Tensor>& tensors;
  const std::vector<double>& eps;
  const Ints& layers;
  int64_t inputs, count;
  std::vector<Value> values;

  Run(const std::vector<Tensor>& given, const std::vector<Tensor>& tensors, const std::vector<double>& eps, const Ints& layers,
      const Ints& results)
      : tensors(tensors), eps(eps), layers(layers), inputs(int64_t(given.size())), count(int64_t(eps.size())), values(inputs + count) {
    STD_TORCH_CHECK(int64_t(layers.size()) == ints * count, "run_layers: a layer has ", ints, " ints and an eps, got ", layers.size(),
                    " and ", count);
    for (int64_t v = 0; v < inputs; v++) {
      STD_TORCH_CHECK(given[v].dim() == 4, "run_layers: a value must be (N, C, H, W), got ", given[v].dim(), " dimensions");
      values[v].x = channels_last(given[v]);
    }
    for (int64_t i = 0; i < count; i++) {
      STD_TORCH_CHECK(at(i)[0] >= stem_layer && at(i)[0] <= pool_layer, "run_layers: unknown kind of layer ", at(i)[0]);
      read(at(i)[1], inputs + i);
      if (at(i)[0] == sum_layer || second(i) >= 0) read(second(i), inputs + i);
    }
    for (const int64_t v : results) read(v, inputs + count);
  }

  const int64_t* at(int64_t i) const { return &layers[ints * i]; }
  int64_t second(int64_t i) const {  // the other value that layer i reads, -1: none
    return at(i)[0] == sum_layer ? at(i)[2] : at(i)[0] == pointwise_layer ? at(i)[3] : -1;
  }
  void read(int64_t v, int64_t known) {
    STD_TORCH_CHECK(v >= 0 && v < known, "run_layers: value ", v, " is read where ", known, " are known");
    values[v].readers++;
  }
  void release(int64_t v) {
    if (--values[v].readers == 0) values[v].x.reset();
  }

  const Tensor& weight(int64_t i) const {
    const int64_t index = at(i)[2];
    STD_TORCH_CHECK(index >= 0 && index < int64_t(tensors.size()), "run_layers: there is no weight ", index);
    return tensors[index];
  }
  MaybeTensor packed(int64_t i) const {
    const int64_t index = at(i)[5];
    STD_TORCH_CHECK(index < int64_t(tensors.size()), "run_layers: there is no tensor ", index);
    return index < 0 ? MaybeTensor() : tensors[index];
  }
  MaybeTensor vector(int64_t index, const Tensor& x) const {  // of half modules: widened
    STD_TORCH_CHECK(index < int64_t(tensors.size()), "run_layers: there is no tensor ", index);
    if (index < 0) return std::nullopt;
    const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    return tensors[index].scalar_type() == wide ? tensors[index] : torch::stable::to(tensors[index], wide);
  }
  PendingTensors norm(int64_t i, const Tensor& x) const {
    const int64_t *const a = at(i) + 2, act = a[4];
    STD_TORCH_CHECK(act >= 0 && act < int64_t(acts.size()), "run_layers: unknown activation ", act);
    PendingTensors norm{vector(a[0], x), vector(a[1], x), vector(a[2], x), vector(a[3], x), eps[i], acts[act]};
    STD_TORCH_CHECK(norm.mean ? norm.var.has_value() : !norm.var && !norm.gamma,
                    "run_layers: mean and var must be given together, and with weight of the norm");
    return norm.mean || !norm.beta                               ? norm
           : norm.beta->scalar_type() == ScalarType::Double ? bias<double>(norm)
                                                            : bias<float>(norm);
  }

  template <class T> static PendingTensors bias(const PendingTensors& norm) {  // x + beta as (x - mean) / 1
    const int64_t c = norm.beta->numel();
    const Array<T> beta(norm.beta, c, "bias");
    const Tensor mean = empty_like_type(*norm.beta, {c}, scalar_type_of<T>()), var = empty_like_type(mean, {c}, scalar_type_of<T>());
    std::transform(beta.data, beta.data + c, static_cast<T*>(mean.mutable_data_ptr()), std::negate<T>());
    std::fill_n(static_cast<T*>(var.mutable_data_ptr()), c, T(1));
    return {mean, var, {}, {}, 0, norm.act};
  }

  const Tensor& real(int64_t v) {
    Value& value = values[v];
    if (value.pending()) value.x = cpu::norm_act(*value.x, value.norm, std::nullopt), value.norm = Value{}.norm;
    return *value.x;
  }

  template <class T> static Tensor factors(const Tensor& x, bool hard) {
    const Array<T> from(x, x.numel(), "gate");
    const Tensor to = empty_like_type(x, {x.numel()}, scalar_type_of<T>());
    std::transform(from.data, from.data + x.numel(), static_cast<T*>(to.mutable_data_ptr()), [&](T v) {
      return hard ? std::clamp<T>(v + 3, 0, 6) / 6 : 1 / (1 + std::exp(-v));
    });
    return to;
  }

  MaybeTensor gate(int64_t i, const Tensor& x) {
    if (second(i) < 0) return std::nullopt;
    STD_TORCH_CHECK(at(i)[4] >= 0 && at(i)[4] < gatings, "run_layers: unknown kind of gate ", at(i)[4]);
    const Tensor g = real(second(i));
    STD_TORCH_CHECK(g.size(0) == x.size(0) && g.size(1) == x.size(1) && g.size(2) == 1 && g.size(3) == 1,
                    "run_layers: a gate must be (N, C, 1, 1) with x (N, C, H, W)");
    const bool hard = at(i)[4] == hardsigmoid_gate;
    return x.scalar_type() == ScalarType::Double ? factors<double>(g, hard) : factors<float>(g, hard);
  }

  // Whether layer i is of that kind, reads what the layer before it gives, and nobody else does.
  bool follows(int64_t i, Kind kind) const {
    return i < count && at(i)[0] == kind && at(i)[1] == inputs + i - 1 && values[inputs + i - 1].readers == 1;
  }
  bool separable(int64_t i) const { return follows(i + 1, norm_layer) && follows(i + 2, pointwise_layer) && second(i + 2) < 0; }

  // The depthwise convolution that is layer i, its norm and the pointwise one; `expand`: and those before it, from that layer on.
  Tensor block(int64_t i, int64_t expand = -1) {
    const int64_t* const g = at(i) + 3;
    const Ints stride{g[0], g[1]}, padding{g[2], g[3], g[4], g[5]}, dilation{g[6], g[7]};
    const Value& in = values[at(expand < 0 ? i : expand)[1]];
    const PendingTensors mid = norm(i + 1, *in.x);
    if (expand < 0) return cpu::separable_conv2d(*in.x, weight(i), weight(i + 2), in.norm, mid, stride, padding, dilation, packed(i + 2));
    return cpu::inverted_residual(*in.x, weight(expand), weight(i), weight(i + 2), in.norm, norm(i - 1, *in.x), mid, stride, padding,
                                  dilation, packed(expand), packed(i + 2));
  }

  // Runs layer i, and those that become one kernel with it; returns how many.
  int64_t step(int64_t i) {
    const int64_t *const a = at(i), *const g = a + 3;
    Value &in = values[a[1]], &out = values[inputs + i];
    switch (a[0]) {
      case stem_layer:
        out.x = std::get<0>(cpu::stem_conv2d(*in.x, weight(i), in.norm, {g[0], g[1]}, {g[2], g[3], g[4], g[5]}, false));
        return 1;
      case depthwise_layer: {
        const Ints stride{g[0], g[1]}, padding{g[2], g[3], g[4], g[5]}, dilation{g[6], g[7]};
        if (separable(i)) {
          values[inputs + i + 2].x = block(i);
          return 3;
        }
        out.x = std::get<0>(cpu::depthwise_conv2d(*in.x, weight(i), in.norm, stride, padding, dilation, false));
        return 1;
      }
      case pointwise_layer:
        if (second(i) < 0 && follows(i + 1, norm_layer) && follows(i + 2, depthwise_layer) && separable(i + 2) && worth_expanding(*in.x)) {
          values[inputs + i + 4].x = block(i + 2, i);
          return 5;
        }
        out.x = std::get<0>(cpu::pointwise_conv2d(*in.x, weight(i), in.norm, false, gate(i, *in.x), packed(i)));
        return 1;
      case norm_layer:
        out.x = real(a[1]), out.norm = norm(i, *out.x);
        return 1;
      case sum_layer: {
        int64_t x = a[1], other = a[2];
        if (!values[x].pending()) std::swap(x, other);
        const Tensor residual = real(other);
        out.x = cpu::norm_act(*values[x].x, values[x].norm, residual);
        return 1;
      }
      default: {
        const Tensor y = cpu::norm_act_pool(*in.x, in.norm);
        out.x = torch::stable::reshape(y, {y.size(0), y.size(1), 1, 1});
        return 1;
      }
    }
  }

  void all() {
    for (int64_t i = 0; i < count;) {
      for (const int64_t end = i + step(i); i < end; i++) {
        release(at(i)[1]);
        if (const int64_t other = second(i); other >= 0) release(other);
      }
    }
  }
};

std::vector<Tensor> run_layers(const Tensor& x, std::vector<Tensor> others, std::vector<Tensor> tensors, std::vector<double> eps,
                               Ints layers, Ints results) {
  others.insert(others.begin(), x);
  Run run(others, tensors, eps, layers, results);
  run.all();
  std::vector<Tensor> found;
  for (const int64_t v : results) found.push_back(run.real(v));
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CPU, m) { m.impl("run_layers", TORCH_BOX(&run_layers)); }

}  // namespace mnops
