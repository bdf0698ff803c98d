// Training forwards of batch norms as nodes of PyTorch's graph, each made and run without Python: at a few thousand
// tokens that takes as long as a pass over them. Includes the passes, and is compiled in their place where it can be.
//
// Each returns the output, the packed moments of the batch, the penalty if there is one, and the running values from
// before it; and nothing at all, having done nothing, for tensors that it is not made for.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/library.h>

#include "cpu.cpp"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

const float* floats(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }
float* mutable_floats(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr; }
const uint8_t* bytes(const Tensor& mask) {
  return mask.defined() ? reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()) : nullptr;
}
Tensor value_or_none(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
at::IValue value_or_null(const Tensor& tensor) { return tensor.defined() ? at::IValue(tensor) : at::IValue(); }
Tensor in_order(const OptionalTensor& tensor) { return tensor ? tensor->contiguous() : Tensor(); }
Tensor to_floats(const Tensor& tensor) { return tensor.defined() ? tensor.to(at::kFloat).contiguous() : tensor; }
Tensor new_floats(const Tensor& x, at::IntArrayRef shape) { return at::empty(shape, x.options().dtype(at::kFloat)); }
Tensor copy(const Tensor& statistic, float factor = 1) {  // PyTorch's own operations take several times as long
  Tensor result = new_floats(statistic, statistic.sizes());
  const float* from = floats(statistic);
  std::transform(from, from + statistic.numel(), mutable_floats(result), [=](float value) { return factor * value; });
  return result;
}
Tensor new_tokens(const Tensor& x) { return at::empty_like(x, at::MemoryFormat::Contiguous); }

template <typename Body>
void for_dtype(const Tensor& x, const Body& body) {
  x.scalar_type() == at::kFloat ? body(float()) : body(bfloat16());
}
template <typename T>
T* tokens(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

bool is_statistic(const Tensor& tensor, int64_t size, at::ScalarType dtype = at::kFloat) {
  return !tensor.defined() || (tensor.device().is_cpu() && tensor.scalar_type() == dtype && tensor.numel() == size &&
                               tensor.is_contiguous() && !tensor.is_inference());
}

void mark_changed(std::initializer_list<Tensor> tensors) {
  for (const Tensor& tensor : tensors)
    if (tensor.defined()) tensor.unsafeGetTensorImpl()->bump_version();
}

// Whether something looks at single operations, as in modeling/paths.py.
bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// An operator of kernels/nodes.py, itself and not what a transform would make of it: that looks at what is in it.
variable_list call_python(const char* name, torch::jit::Stack arguments) {
  const auto callee = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  callee.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, arguments);
  return arguments[0].toTensorVector();
}

// What `.data =` and `.to()` change in place is no new version of a tensor.
void check_saved(const Tensor& x, const Tensor& weight, const Tensor& g) {
  TORCH_CHECK(x.device().is_cpu() && weight.device().is_cpu() && weight.numel() == x.size(-1) && x.numel() == g.numel(),
              "A weight or an input of a norm has changed its size or device since the forward: run that anew.");
}

// A norm with its batch, and what a forward makes of it besides the output.
struct Norm {
  Tensor mask;              // in order, or undefined
  Tensor running[3];        // mean, var and power, undefined where they are not kept
  Tensor updates, pending;  // pending: where moments are pooled, or undefined
  double momentum, eps;
  Tensor packed;         // moments of the batch
  variable_list before;  // running values from before it

  bool fits(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const {
    if (!x.device().is_cpu() || x.dim() == 0 || x.numel() == 0 || x.is_inference()) return false;
    if (x.scalar_type() != at::kFloat && x.scalar_type() != at::kBFloat16) return false;
    const int64_t c = x.size(-1);
    for (const Tensor& value : {weight, value_or_none(bias)})
      if (value.defined() && (!value.device().is_cpu() || value.numel() != c)) return false;
    if (!is_statistic(mask, x.numel() / c, at::kBool) || !is_statistic(updates, 1, at::kLong)) return false;
    for (const Tensor& value : running)
      if (!is_statistic(value, c)) return false;
    return is_statistic(pending, 2 * c + 1);
  }

  void keep_running() {
    for (const Tensor& value : running)
      if (value.defined()) before.push_back(copy(value));
  }

  void track() const {
    const int64_t c = packed.numel() / 2;
    if (pending.defined()) {
      merge(mutable_floats(pending), floats(packed), c);
      return mark_changed({pending});
    }
    update(mutable_floats(running[0]), mutable_floats(running[1]), mutable_floats(running[2]),
           updates.mutable_data_ptr<int64_t>(), floats(packed), c, momentum);
    mark_changed({running[0], running[1], running[2], updates});
  }
};

// As BatchStandardize in modeling/standardize.py.
struct BatchNorm : torch::autograd::Function<BatchNorm> {
  struct Penalty {
    std::string distance;
    double weight_mean, weight_var;
  };

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               Norm* norm, bool centered, const std::optional<Penalty>& penalty) {
    const int64_t c = x.size(-1), n = x.numel() / c;
    const Tensor rows = x.contiguous(), gain = to_floats(weight), offset = to_floats(value_or_none(bias));
    const Tensor y = new_tokens(x), value = penalty ? new_floats(x, {}) : Tensor();
    const Tensor of_packed = penalty ? new_floats(x, {2 * c + 1}) : Tensor();
    norm->packed = new_floats(x, {2 * c + 1});
    norm->keep_running();
    for_dtype(x, [&](auto number) {
      using T = decltype(number);
      standardize<T>(tokens<T>(rows), bytes(norm->mask), floats(gain), floats(offset), tokens<T>(y),
                     mutable_floats(norm->packed), n, c, centered, norm->eps, at::get_num_threads());
    });
    if (penalty)
      penalize(floats(norm->packed), floats(norm->running[0]), floats(norm->running[1]), mutable_floats(value),
               mutable_floats(of_packed), c, penalty->distance == "relative", penalty->distance == "reference",
               penalty->weight_mean, penalty->weight_var, norm->eps);
    norm->track();
    ctx->set_materialize_grads(false);
    variable_list saved{x, weight, norm->mask, norm->packed, of_packed};
    if (penalty) saved.insert(saved.end(), norm->before.begin(), norm->before.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["centered"] = centered;
    ctx->saved_data["eps"] = norm->eps;
    if (penalty) {
      ctx->saved_data["distance"] = penalty->distance;
      ctx->saved_data["weights"] = std::vector<double>{penalty->weight_mean, penalty->weight_var};
    }
    return penalty ? variable_list{y, value} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& of) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &mask = saved[2], &packed = saved[3], &of_penalty = saved[4];
    const Tensor of_value = of.size() > 1 ? of[1] : Tensor();
    auto& options = ctx->saved_data;
    if (at::GradMode::is_enabled() || is_watched()) {
      torch::jit::Stack arguments{value_or_null(of[0]), value_or_null(of_value), x, weight, value_or_null(mask)};
      arguments.emplace_back(c10::List<Tensor>(at::ArrayRef<Tensor>(saved).slice(5)));
      for (const char* name : {"centered", "eps", "distance", "weights"}) arguments.push_back(options[name]);
      variable_list results = call_python("hf_normswap::batch_norm_backward", std::move(arguments));
      if (!options["has_bias"].toBool()) results[2] = Tensor();
      results.resize(6);
      return results;
    }
    const Tensor g = of[0].defined() ? of[0].to(x.scalar_type()).contiguous() : at::zeros_like(x).contiguous();
    check_saved(x, weight, g);
    const int64_t c = x.size(-1), n = x.numel() / c;
    const Tensor of_packed = of_value.defined() ? copy(of_penalty, *floats(of_value)) : Tensor();
    const Tensor rows = x.contiguous(), gain = to_floats(weight), dx = new_tokens(x);
    const Tensor of_weight = new_floats(x, {c}), of_bias = new_floats(x, {c});
    for_dtype(x, [&](auto number) {
      using T = decltype(number);
      standardize_backward<T>(tokens<T>(g), tokens<T>(rows), bytes(mask), floats(gain), floats(packed),
                              floats(of_packed), tokens<T>(dx), mutable_floats(of_weight), mutable_floats(of_bias), n,
                              c, options["centered"].toBool(), options["eps"].toDouble(), at::get_num_threads());
    });
    variable_list results{dx, of_weight.to(weight.scalar_type())};
    if (options["has_bias"].toBool()) results.push_back(of_bias.to(weight.scalar_type()));
    results.resize(6);
    return results;
  }
};

// As PowerNorm's backward in modeling/powernorm.py: the running gradient statistic, and what becomes of it.
struct PowerNorm : torch::autograd::Function<PowerNorm> {
  struct Gradient {
    Tensor nu, largest_gamma, loss_scale, pending;  // pending: where its sums are pooled, or undefined
    double momentum;
    bool by_batch;  // whether it is divided by the batch's own power
  };

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                               Norm* norm, const Gradient& gradient, int64_t groups) {
    const int64_t c = x.size(-1), n = x.numel() / c;
    const Tensor rows = x.contiguous(), gain = to_floats(weight), offset = to_floats(value_or_none(bias));
    const Tensor y = new_tokens(x);
    norm->packed = new_floats(x, {2 * c + 1});
    norm->keep_running();
    norm->before.push_back(copy(gradient.nu));
    const Tensor &power = norm->before[0], nu = copy(gradient.nu, *floats(gradient.loss_scale));
    for_dtype(x, [&](auto number) {
      using T = decltype(number);
      rescale<T>(tokens<T>(rows), bytes(norm->mask), floats(power), floats(gain), floats(offset), tokens<T>(y),
                 mutable_floats(norm->packed), n, c, groups, norm->eps, at::get_num_threads());
    });
    norm->track();
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, weight, norm->mask, norm->packed, power, nu});
    // Not saved for backward: updated there on purpose.
    for (const auto& [name, value] : {std::pair{"nu", gradient.nu}, {"largest_gamma", gradient.largest_gamma},
                                      {"loss_scale", gradient.loss_scale}, {"pending", gradient.pending}})
      ctx->saved_data[name] = value;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["momentum"] = gradient.momentum;
    ctx->saved_data["by_batch"] = gradient.by_batch;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["eps"] = norm->eps;
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& of) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &mask = saved[2], &packed = saved[3], &power = saved[4];
    auto& options = ctx->saved_data;
    variable_list results(6);
    if (!of[0].defined()) return results;
    TORCH_CHECK(!is_watched(), "PowerNorm's backward changes its statistics: trace or transform its forward, too.");
    check_saved(x, weight, of[0]);
    const bool is_differentiated_again = at::GradMode::is_enabled() && of[0].requires_grad();
    const at::AutoGradMode no_graph(false);
    const int64_t c = x.size(-1), n = x.numel() / c;
    const Tensor g = of[0].to(x.scalar_type()).contiguous(), rows = x.contiguous(), gain = to_floats(weight);
    const Tensor dx = new_tokens(x), of_weight = new_floats(x, {c}), of_bias = new_floats(x, {c});
    const Tensor of_batch = new_floats(x, {2 * c + 1});
    Tensor of_power;
    if (options["by_batch"].toBool()) {
      of_power = new_floats(x, {c});
      get_power(floats(packed), mutable_floats(of_power), c);
    }
    for_dtype(x, [&](auto number) {
      using T = decltype(number);
      rescale_backward<T>(tokens<T>(g), tokens<T>(rows), bytes(mask), floats(gain), floats(power), floats(of_power),
                          floats(saved[5]), floats(packed), tokens<T>(dx), mutable_floats(of_weight),
                          mutable_floats(of_bias), mutable_floats(of_batch), n, c, options["groups"].toInt(),
                          options["eps"].toDouble(), at::get_num_threads());
    });
    const Tensor nu = options["nu"].toTensor(), largest_gamma = options["largest_gamma"].toTensor();
    if (options["pending"].toTensor().defined()) {
      options["pending"].toTensor().add_(of_batch);
    } else {
      update_nu(mutable_floats(nu), mutable_floats(largest_gamma), floats(of_batch),
                floats(options["loss_scale"].toTensor()), c, options["momentum"].toDouble());
      mark_changed({nu, largest_gamma});
    }
    results = {dx, of_weight.to(weight.scalar_type())};
    if (options["has_bias"].toBool()) results.push_back(of_bias.to(weight.scalar_type()));
    if (is_differentiated_again)
      results = call_python("hf_normswap::refuse_second_derivative", {at::IValue(c10::List<Tensor>(results))});
    results.resize(6);
    return results;
  }
};

variable_list collect(variable_list results, const Norm& norm) {
  results.insert(results.begin() + 1, norm.packed);
  results.insert(results.end(), norm.before.begin(), norm.before.end());
  return results;
}

variable_list batch_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                         const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& power,
                         const Tensor& updates, const OptionalTensor& pending, double momentum, double eps,
                         bool centered, std::optional<std::string> distance, double weight_mean, double weight_var) {
  Norm norm{in_order(mask), {value_or_none(mean), value_or_none(var), value_or_none(power)}, updates,
            value_or_none(pending), momentum, eps};
  if (!norm.fits(x, weight, bias)) return {};
  std::optional<BatchNorm::Penalty> penalty;
  if (distance) {
    const bool is_known = *distance == "relative" || *distance == "paper" || *distance == "reference";
    if (!is_known || !mean || !var) return {};
    penalty = BatchNorm::Penalty{*distance, weight_mean, weight_var};
  }
  variable_list results = BatchNorm::apply(x, weight, bias, &norm, centered, penalty);
  return collect(std::move(results), norm);
}

variable_list power_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                         const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& power,
                         const Tensor& updates, const OptionalTensor& pending, double momentum, double eps,
                         const Tensor& nu, const Tensor& largest_gamma, const Tensor& loss_scale,
                         const OptionalTensor& pending_gradient, double momentum_of_nu, bool by_batch, int64_t groups) {
  Norm norm{in_order(mask), {value_or_none(mean), value_or_none(var), value_or_none(power)}, updates,
            value_or_none(pending), momentum, eps};
  const PowerNorm::Gradient gradient{nu, largest_gamma, loss_scale, value_or_none(pending_gradient), momentum_of_nu,
                                     by_batch};
  if (!norm.fits(x, weight, bias) || mean || var || !power) return {};
  const int64_t c = x.size(-1);
  if (!is_statistic(nu, c) || !is_statistic(largest_gamma, 1) || !is_statistic(loss_scale, 1)) return {};
  if (!is_statistic(gradient.pending, 2 * c + 1)) return {};
  variable_list results = PowerNorm::apply(x, weight, bias, &norm, gradient, groups);
  return collect(std::move(results), norm);
}

}  // namespace

// Not by a static object of the file, which may be loaded twice. Returns what went wrong, or null.
extern "C" const char* register_nodes() {
  static const std::string said = []() -> std::string {
    try {
      static torch::Library library(torch::Library::FRAGMENT, "hf_normswap", std::nullopt, __FILE__, __LINE__);
      library.def("batch_norm", &batch_norm);
      library.def("power_norm", &power_norm);
      return {};
    } catch (const std::exception& error) {
      return error.what();
    }
  }();
  return said.empty() ? nullptr : said.c_str();
}
