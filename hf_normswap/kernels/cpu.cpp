// Passes over the tokens of a batch norm, each one trip through memory; plain functions, called through ctypes.
//
// x, y, g, dx: n rows of c channels, float32 or bfloat16. mask: n bytes, 1 at real tokens, or null. Statistics and
// coefficients: float32, moments packed as count, mean and m2; a null center or shift is zero. With groups > 0, z is x
// divided by the root mean square of each group of channels of its token, else z is x. A pad may hold anything: what
// has no finite sum of squares counts as zero there.
// Rows are divided among the threads in order and partial results merged in order: no result varies from run to run.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline void store(float* to, float value) { *to = value; }
inline void store(bfloat16* to, float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = uint16_t(value != value ? 0x7fc0 : rounded);
}

constexpr int64_t kHead = 64;   // the usual size of a group, for which loops are unrolled
constexpr int64_t kBlock = 64;  // rows whose sums are added up in float32, before they are merged in float64

// A new tensor of this size costs more in page faults than in arithmetic, unless its pages are large.
inline void ask_for_large_pages(void* start, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096, kLarge = 2 << 20;
  if (!start || bytes < int64_t(2 * kLarge)) return;
  const uintptr_t first = (uintptr_t(start) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), (uintptr_t(start) + bytes - first) / kPage * kPage, MADV_HUGEPAGE);
#endif
}

// Asks for the row after `row`, to be written: the stores of this one do not make the processor fetch the next page.
template <typename T>
inline void ask_for_next(T* row, int64_t c) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t j = c; j < 2 * c; j += kLine) __builtin_prefetch(row + j, 1);
}

template <typename Body>
void for_each_share(int threads, int64_t n, const Body& body) {
  const int64_t share = (n + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) body(t, std::min(n, t * share), std::min(n, (t + 1) * share));
}

template <typename T>
inline bool is_clean(const T* x, int64_t c) {
  const float bound = std::sqrt(std::numeric_limits<float>::max()) / c;
  int dirty = 0;
#pragma omp simd reduction(| : dirty)
  for (int64_t j = 0; j < c; ++j) dirty |= !(std::fabs(load(x[j])) < bound);
  return !dirty;
}

template <typename T>
inline void clean(const T* x, T* out, int64_t c) {
  const float bound = std::sqrt(std::numeric_limits<float>::max()) / c;
  for (int64_t j = 0; j < c; ++j) store(out + j, std::fabs(load(x[j])) < bound ? load(x[j]) : 0.0f);
}

// Factor 1 / rms of one group.
template <typename T>
inline float inverse_rms(const T* x, int64_t width, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < width; ++j) sum += load(x[j]) * load(x[j]);
  return 1 / std::sqrt(sum / width + eps);
}

// y = scale (x - center) + shift of a row, and its squares added to `squares`; either of them or both.
template <typename T>
inline void forward_row(const T* x, T* y, const float* center, const float* scale, const float* shift, float* squares,
                        int64_t c) {
  if (y && squares) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) {
      const float z = load(x[j]);
      store(y + j, (z - center[j]) * scale[j] + shift[j]);
      squares[j] += z * z;
    }
  } else if (y) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) store(y + j, (load(x[j]) - center[j]) * scale[j] + shift[j]);
  } else if (squares) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) squares[j] += load(x[j]) * load(x[j]);
  }
}

template <int64_t kWidth, typename T>
inline void forward_grouped(const T* x, T* y, const float* center, const float* scale, const float* shift,
                            float* squares, int64_t c, int64_t groups, float eps) {
  const int64_t width = kWidth ? kWidth : c / groups;
  for (int64_t o = 0; o < c; o += width) {
    const float inverse = inverse_rms(x + o, width, eps);
    if (y) {
#pragma omp simd
      for (int64_t j = o; j < o + width; ++j) store(y + j, (load(x[j]) * inverse - center[j]) * scale[j] + shift[j]);
    }
    if (squares) {
      const float power = inverse * inverse;
#pragma omp simd
      for (int64_t j = o; j < o + width; ++j) squares[j] += load(x[j]) * load(x[j]) * power;
    }
  }
}

template <typename T>
void affine_fwd(const T* x, const uint8_t* mask, const float* center, const float* scale, const float* shift, T* y,
                float* squares, int64_t n, int64_t c, int64_t groups, float eps, int threads) {
  ask_for_large_pages(y, n * c * sizeof(T));
  const std::vector<float> zeros(c);
  if (!center) center = zeros.data();
  std::vector<std::vector<double>> parts(threads);
  for_each_share(threads, n, [&](int t, int64_t begin, int64_t end) {
    std::vector<float> block(squares ? c : 0);
    std::vector<T> cleaned(c);
    if (squares) parts[t].assign(c, 0);
    const auto grouped = groups && c / groups == kHead ? forward_grouped<kHead, T> : forward_grouped<0, T>;
    for (int64_t row = begin; row < end; ++row) {
      const T* from = x + row * c;
      T* to = y ? y + row * c : nullptr;
      if (to) ask_for_next(to, c);
      const bool is_real = !mask || mask[row];
      if (!is_real && !is_clean(from, c)) clean(from, cleaned.data(), c), from = cleaned.data();
      float* sums = squares && is_real ? block.data() : nullptr;
      if (groups) grouped(from, to, center, scale, shift, sums, c, groups, eps);
      else forward_row(from, to, center, scale, shift, sums, c);
      if ((row - begin) % kBlock != kBlock - 1 && row != end - 1) continue;
      for (int64_t j = 0; squares && j < c; ++j) parts[t][j] += block[j], block[j] = 0;
    }
  });
  for (int64_t j = 0; squares && j < c; ++j) {
    double total = 0;
    for (const auto& part : parts) total += part[j];
    squares[j] = float(total);
  }
}

// R rows at a time, where they are only read: so many streams of memory are fetched side by side.
template <int R, typename Body>
void in_batches(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + R <= count; i += R) body(std::integral_constant<int, R>(), i);
  for (; i < count; ++i) body(std::integral_constant<int, 1>(), i);
}

struct Moments {
  double count = 0;
  std::vector<double> mean, m2;

  // With those of n rows, of mean `reference + shift`. Chan, Golub and LeVeque, 1983.
  void merge(double n, const float* reference, const float* shift, const float* squares) {
    const double share = n / (count + n), between = count * n / (count + n);
    for (size_t j = 0; j < mean.size(); ++j) {
      const double delta = double(reference[j]) + shift[j] - mean[j];
      mean[j] += delta * share;
      m2[j] += squares[j] + delta * delta * between;
    }
    count += n;
  }

  void pack(float* packed) const {
    *packed = float(count);
    std::copy(m2.begin(), m2.end(), std::copy(mean.begin(), mean.end(), packed + 1));
  }

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double share = other.count / (count + other.count), between = count * share;
    for (size_t j = 0; j < mean.size(); ++j) {
      const double delta = other.mean[j] - mean[j];
      mean[j] += delta * share;
      m2[j] += other.m2[j] + delta * delta * between;
    }
    count += other.count;
  }
};

// Two passes over blocks that stay in the cache between them, then merged: never E[x^2] - E[x]^2, which cancels.
template <typename T>
void moments(const T* x, const uint8_t* mask, float* packed, int64_t n, int64_t c, int64_t, float, int threads) {
  constexpr int R = 8;
  const int64_t size = std::max<int64_t>(R, std::min<int64_t>(kBlock, 32768 / c / R * R));
  // Real tokens are shared out, and not rows: sequences may be ordered by their length.
  std::vector<const T*> reals;
  reals.reserve(n);
  for (int64_t row = 0; row < n; ++row)
    if (!mask || mask[row]) reals.push_back(x + row * c);
  std::vector<Moments> parts(threads);
  for_each_share(threads, reals.size(), [&](int t, int64_t begin, int64_t end) {
    std::vector<float> reference(c), shift(c), squares(c);
    const T* const* rows = nullptr;  // those of a block
    parts[t].mean.assign(c, 0), parts[t].m2.assign(c, 0);
    auto add = [&](auto R, int64_t i) {
      const T* const* x = rows + i;
      const float* of = reference.data();
      float* to = shift.data();
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) {
        float total = 0;
        for (int r = 0; r < R; ++r) total += load(x[r][j]) - of[j];
        to[j] += total;
      }
    };
    auto add_squares = [&](auto R, int64_t i) {
      const T* const* x = rows + i;
      const float *of = reference.data(), *mean = shift.data();
      float* to = squares.data();
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) {
        float total = 0;
        for (int r = 0; r < R; ++r) {
          const float deviation = load(x[r][j]) - of[j] - mean[j];
          total += deviation * deviation;
        }
        to[j] += total;
      }
    };
    for (int64_t start = begin; start < end; start += size) {
      const int64_t count = std::min(size, end - start);
      rows = &reals[start];
      // About one of the rows: a mean far from zero would cost the digits of its sum.
      for (int64_t j = 0; j < c; ++j) reference[j] = load(rows[0][j]);
      std::fill(shift.begin(), shift.end(), 0.0f), std::fill(squares.begin(), squares.end(), 0.0f);
      in_batches<R>(count, add);
      for (int64_t j = 0; j < c; ++j) shift[j] /= count;
      in_batches<R>(count, add_squares);
      parts[t].merge(count, reference.data(), shift.data(), squares.data());
    }
  });
  Moments& all = parts[0];
  for (int t = 1; t < threads; ++t) all.merge(parts[t]);
  all.pack(packed);
}

// Of the gradient of z: grad_scale g + input_scale (z - center) + offset, each of c channels.
struct Coefficients {
  const float *center, *grad_scale, *input_scale, *offset;
};

// dx of a row, without groups; and g and g (x - center) added to the sums, if wanted.
template <typename T>
inline void backward_row(const T* g, const T* x, T* dx, Coefficients k, float* sum_g, float* sum_gz, int64_t c) {
  const float *center = k.center, *grad_scale = k.grad_scale, *input_scale = k.input_scale, *offset = k.offset;
  if (sum_g) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) {
      const float gj = load(g[j]), zj = load(x[j]) - center[j];
      store(dx + j, grad_scale[j] * gj + (input_scale[j] * zj + offset[j]));
      sum_g[j] += gj, sum_gz[j] += gj * zj;
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j)
      store(dx + j, grad_scale[j] * load(g[j]) + (input_scale[j] * (load(x[j]) - center[j]) + offset[j]));
  }
}

template <typename T>
inline void scale_row(const T* g, const float* grad_scale, T* dx, int64_t c) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) store(dx + j, grad_scale[j] * load(g[j]));
}

// g and g (x - center) of R rows of each, added to the sums.
template <int R, typename T>
inline void add_products(const T* const* gs, const T* const* xs, const float* center, float* sum_g, float* sum_gz,
                         int64_t c) {
  const T *g[R], *x[R];
  for (int r = 0; r < R; ++r) g[r] = gs[r], x[r] = xs[r];
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    float total = 0, products = 0;
    for (int r = 0; r < R; ++r) {
      const float gj = load(g[r][j]);
      total += gj, products += gj * (load(x[r][j]) - center[j]);
    }
    sum_g[j] += total, sum_gz[j] += products;
  }
}

// The same from z on through the group scaling; `grad_z`: space for the gradient of a group.
template <int64_t kWidth, typename T>
inline void backward_grouped(const T* g, const T* x, T* dx, Coefficients k, float* sum_g, float* sum_gz, float* grad_z,
                             int64_t c, int64_t groups, float eps) {
  const int64_t width = kWidth ? kWidth : c / groups;
  for (int64_t o = 0; o < c; o += width) {
    const T *gi = g + o, *xi = x + o;
    const float *center = k.center + o, *grad_scale = k.grad_scale + o, *input_scale = k.input_scale + o,
                *offset = k.offset + o;
    const float inverse = inverse_rms(xi, width, eps);
    if (sum_g) {
      float *to_g = sum_g + o, *to_gz = sum_gz + o;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        to_g[j] += load(gi[j]);
        to_gz[j] += load(gi[j]) * (load(xi[j]) * inverse - center[j]);
      }
    }
    if (!dx) continue;
    T* to = dx + o;
    float product = 0;
#pragma omp simd reduction(+ : product)
    for (int64_t j = 0; j < width; ++j) {
      const float z = load(xi[j]) * inverse,
                  value = grad_scale[j] * load(gi[j]) + (input_scale[j] * (z - center[j]) + offset[j]);
      grad_z[j] = value;
      product += value * z;
    }
    product *= inverse / width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) store(to + j, inverse * (grad_z[j] - load(xi[j]) * product));
  }
}

// sums, 4 x c: of g and of g (z - center) over real tokens, and over pads. At pads the gradient of z is
// pad_grad_scale g. dirty, n bytes or null: the pads that hold something not finite. A pass for sums alone writes it,
// and a pass for dx alone then reads no x at the other pads.
template <typename T>
void backward_rows(const T* g, const T* x, const uint8_t* mask, const float* center, const float* grad_scale,
                   const float* input_scale, const float* offset, const float* pad_grad_scale, T* dx, float* sums,
                   uint8_t* dirty, int64_t n, int64_t c, int64_t groups, float eps, int threads) {
  ask_for_large_pages(dx, n * c * sizeof(T));
  const std::vector<float> zeros(c);
  if (!center) center = zeros.data();
  const Coefficients at_real{center, grad_scale, input_scale, offset ? offset : zeros.data()};
  const Coefficients at_pad{center, pad_grad_scale, zeros.data(), zeros.data()};
  std::vector<std::vector<double>> parts(threads);
  for_each_share(threads, n, [&](int t, int64_t begin, int64_t end) {
    std::vector<float> block(sums ? 4 * c : 0), grad_z(groups ? c / groups : 0);
    std::vector<T> cleaned;  // of the dirty pads of a block
    if (sums) parts[t].assign(4 * c, 0);
    std::vector<const T*> gs[2], xs[2];  // pads and real tokens whose sums are yet to be added
    const auto grouped = groups && c / groups == kHead ? backward_grouped<kHead, T> : backward_grouped<0, T>;
    for (int64_t row = begin; row < end; ++row) {
      const T *gi = g + row * c, *xi = x + row * c;
      T* to = dx ? dx + row * c : nullptr;
      if (to) ask_for_next(to, c);
      const bool is_real = !mask || mask[row];
      if (!is_real && !sums && dirty && !dirty[row]) {
        scale_row(gi, pad_grad_scale, to, c);
        continue;
      }
      const bool is_dirty = !is_real && !is_clean(xi, c);
      if (sums && dirty) dirty[row] = is_dirty;
      if (is_dirty) {
        cleaned.resize(kBlock * c);
        T* instead = cleaned.data() + (row - begin) % kBlock * c;
        clean(xi, instead, c), xi = instead;
      }
      float* to_g = sums ? block.data() + (is_real ? 0 : 2 * c) : nullptr;
      float* to_gz = sums ? to_g + c : nullptr;
      const Coefficients& coefficients = is_real ? at_real : at_pad;
      if (groups) grouped(gi, xi, to, coefficients, to_g, to_gz, grad_z.data(), c, groups, eps);
      else if (to) backward_row(gi, xi, to, coefficients, to_g, to_gz, c);
      else gs[is_real].push_back(gi), xs[is_real].push_back(xi);
      for (int64_t j = 0; is_dirty && to && j < c; ++j)
        if (load(xi[j]) == 0 && load(x[row * c + j]) != 0) store(to + j, 0.0f);
      if ((row - begin) % kBlock != kBlock - 1 && row != end - 1) continue;
      for (int real = 0; real < 2; ++real) {
        float* to_real = block.data() + (real ? 0 : 2 * c);
        in_batches<4>(gs[real].size(), [&](auto R, int64_t i) {
          add_products<R>(&gs[real][i], &xs[real][i], center, to_real, to_real + c, c);
        });
        gs[real].clear(), xs[real].clear();
      }
      for (int64_t j = 0; sums && j < 4 * c; ++j) parts[t][j] += block[j], block[j] = 0;
    }
  });
  for (int64_t j = 0; sums && j < 4 * c; ++j) {
    double total = 0;
    for (const auto& part : parts) total += part[j];
    sums[j] = float(total);
  }
}

template <typename T>
void affine_bwd(const T* g, const T* x, const uint8_t* mask, const float* center, const float* grad_scale,
                const float* input_scale, const float* offset, const float* pad_grad_scale, T* dx, float* sums,
                int64_t n, int64_t c, int64_t groups, float eps, int threads) {
  backward_rows<T>(g, x, mask, center, grad_scale, input_scale, offset, pad_grad_scale, dx, sums, nullptr, n, c,
                   groups, eps, threads);
}

float count_real(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  for (int64_t row = 0; mask && row < n; ++row) count += mask[row] != 0;
  return float(mask ? count : n);
}

// y = weight (x - mean) / sqrt(variance + eps) + bias, with a null mean or bias for zeros.
template <typename T>
void scale(const T* x, const uint8_t* mask, const float* mean, const float* variance, float per, const float* weight,
           const float* bias, T* y, float* squares, int64_t n, int64_t c, int64_t groups, float eps, int threads) {
  std::vector<float> factor(c), shift(c);
  for (int64_t j = 0; j < c; ++j) {
    factor[j] = weight[j] / std::sqrt(variance[j] / per + eps);
    if (bias) shift[j] = bias[j];
  }
  affine_fwd(x, mask, mean, factor.data(), shift.data(), y, squares, n, c, groups, eps, threads);
}

template <typename T>
void batch_norm_fwd(const T* x, const uint8_t* mask, const float* weight, const float* bias, T* y, float* packed,
                    int64_t n, int64_t c, int64_t centered, float eps, int threads) {
  float *mean = packed + 1, *m2 = mean + c;
  if (centered) {
    moments(x, mask, packed, n, c, 0, eps, threads);
  } else {
    affine_fwd<T>(x, mask, nullptr, nullptr, nullptr, nullptr, m2, n, c, 0, eps, threads);
    std::fill(mean, mean + c, 0.0f);
    *packed = count_real(mask, n);
  }
  scale<T>(x, mask, mean, m2, std::max(*packed, 1.0f), weight, bias, y, nullptr, n, c, 0, eps, threads);
}

template <typename T>
void batch_norm_bwd(const T* g, const T* x, const uint8_t* mask, const float* weight, const float* packed,
                    const float* grad_packed, T* dx, float* grad_weight, float* grad_bias, int64_t n, int64_t c,
                    int64_t centered, float eps, int threads) {
  const float *mean = packed + 1, *m2 = mean + c;
  std::vector<float> sums(4 * c), grad_scale(c), input_scale(c), offset(c);
  std::vector<uint8_t> dirty(mask ? n : 0);
  backward_rows<T>(g, x, mask, mean, nullptr, nullptr, nullptr, nullptr, nullptr, sums.data(), dirty.data(), n, c, 0,
                   eps, threads);
  const float number = std::max(*packed, 1.0f);
  for (int64_t j = 0; j < c; ++j) {
    const float inverse = 1 / std::sqrt(m2[j] / number + eps), share = -weight[j] * inverse / number;
    grad_scale[j] = weight[j] * inverse;
    input_scale[j] = share * sums[c + j] * (inverse * inverse) + (grad_packed ? 2 * grad_packed[1 + c + j] : 0);
    offset[j] = (centered ? share * sums[j] : 0) + (grad_packed ? grad_packed[1 + j] / number : 0);
    grad_weight[j] = inverse * (sums[c + j] + sums[3 * c + j]);
    grad_bias[j] = sums[j] + sums[2 * c + j];
  }
  const float* scale = grad_scale.data();
  backward_rows<T>(g, x, mask, mean, scale, input_scale.data(), offset.data(), scale, dx, nullptr, dirty.data(), n, c,
                   0, eps, threads);
}

template <typename T>
void power_norm_fwd(const T* x, const uint8_t* mask, const float* power, const float* weight, const float* bias, T* y,
                    float* packed, int64_t n, int64_t c, int64_t groups, float eps, int threads) {
  scale<T>(x, mask, nullptr, power, 1, weight, bias, y, packed + 1 + c, n, c, groups, eps, threads);
  std::fill(packed + 1, packed + 1 + c, 0.0f);
  *packed = count_real(mask, n);
}

template <typename T>
void power_norm_bwd(const T* g, const T* x, const uint8_t* mask, const float* weight, const float* power,
                    const float* grad_power, const float* nu, const float* packed, T* dx, float* grad_weight,
                    float* grad_bias, float* batch_sums, int64_t n, int64_t c, int64_t groups, float eps,
                    int threads) {
  std::vector<float> sums(4 * c), inverse(c), grad_scale(c), input_scale(c), pad_grad_scale(c);
  for (int64_t j = 0; j < c; ++j) {
    inverse[j] = 1 / std::sqrt(power[j] + eps);
    const float grad_inverse = grad_power ? 1 / std::sqrt(grad_power[j] + eps) : inverse[j];
    grad_scale[j] = weight[j] * grad_inverse;
    input_scale[j] = -nu[j] * inverse[j] * grad_inverse;
    pad_grad_scale[j] = weight[j] * inverse[j];
  }
  affine_bwd<T>(g, x, mask, nullptr, grad_scale.data(), input_scale.data(), nullptr, pad_grad_scale.data(), dx,
                sums.data(), n, c, groups, eps, threads);
  const float* squares = packed + 1 + c;
  batch_sums[0] = *packed;
  for (int64_t j = 0; j < c; ++j) {
    grad_weight[j] = inverse[j] * (sums[c + j] + sums[3 * c + j]);
    grad_bias[j] = sums[j] + sums[2 * c + j];
    batch_sums[1 + j] = inverse[j] * inverse[j] * squares[j];
    batch_sums[1 + c + j] = pad_grad_scale[j] * sums[c + j];
  }
}

Moments unpack(const float* packed, int64_t c) {
  const float* m2 = packed + 1 + c;
  return {*packed, {packed + 1, m2}, {m2, m2 + c}};
}

bool all_finite(const float* values, int64_t c) {
  bool result = true;
  for (int64_t j = 0; j < c; ++j) result &= std::isfinite(values[j]);
  return result;
}

void get_power(const float* packed, float* power, int64_t c) {
  const float number = std::max(*packed, 1.0f), *mean = packed + 1, *m2 = mean + c;
  for (int64_t j = 0; j < c; ++j) power[j] = m2[j] / number + mean[j] * mean[j];
}

}  // namespace

// A null running value is not kept.
extern "C" void update_running(float* mean, float* var, float* power, int64_t* updates, const float* packed, int64_t c,
                               float weight) {
  const float number = std::max(*packed, 1.0f), *batch_mean = packed + 1, *m2 = batch_mean + c;
  std::vector<float> batch_var(c), batch_power(c);
  for (int64_t j = 0; j < c; ++j) batch_var[j] = m2[j] / number;
  get_power(packed, batch_power.data(), c);
  float* const running[] = {mean, var, power};
  const float* const values[] = {batch_mean, batch_var.data(), batch_power.data()};
  bool valid = *packed > 0;
  for (int i = 0; i < 3; ++i) valid = valid && (!running[i] || all_finite(values[i], c));
  for (int i = 0; valid && i < 3; ++i)
    for (int64_t j = 0; running[i] && j < c; ++j)
      running[i][j] = weight == 1 ? values[i][j] : running[i][j] + weight * (values[i][j] - running[i][j]);
  *updates += valid;
}

extern "C" void update_nu(float* nu, float* largest_gamma, const float* batch_sums, const float* loss_scale, int64_t c,
                          float weight) {
  const float number = std::max(batch_sums[0], 1.0f), scale_of_loss = number * *loss_scale;
  const float *gamma = batch_sums + 1, *lambda = gamma + c;
  bool valid = batch_sums[0] > 0 && all_finite(gamma, c);
  for (int64_t j = 0; j < c; ++j) valid = valid && std::isfinite(lambda[j] / scale_of_loss);
  if (!valid) return;
  for (int64_t j = 0; j < c; ++j) {
    const float power = gamma[j] / number, step = std::min(weight, 1 / power);
    nu[j] += step * (lambda[j] / scale_of_loss - nu[j] * power);
    *largest_gamma = std::max(*largest_gamma, power);
  }
}

extern "C" void merge_pending(float* pooled, const float* packed, int64_t c) {
  Moments all = unpack(pooled, c);
  all.merge(unpack(packed, c));
  all.pack(pooled);
}

// Weighted distances of a batch's moments from running ones (modeling/discrepancy.py), and the gradient of the
// moments.
extern "C" void penalty_with_grad(const float* packed, const float* mean, const float* var, float* value,
                                  float* grad_packed, int64_t c, int64_t relative, int64_t by_variances,
                                  float weight_mean, float weight_var, float eps) {
  const float number = *packed, *batch_mean = packed + 1, *m2 = batch_mean + c;
  std::fill(grad_packed, grad_packed + 2 * c + 1, 0.0f);
  double total = 0;
  for (int64_t j = 0; number > 0 && j < c; ++j) {
    const float sigma = std::sqrt(var[j] + eps), batch_sigma = std::sqrt(m2[j] / number + eps);
    const float unit = relative ? 1 / (sigma * sigma * c) : 1.0f, gap = batch_mean[j] - mean[j];
    const float spread = by_variances ? m2[j] / number - var[j] : batch_sigma - sigma;
    total += double(weight_mean) * unit * gap * gap;
    total += double(weight_var) * (by_variances ? std::fabs(spread) : unit * spread * spread);
    grad_packed[1 + j] = 2 * weight_mean * unit * gap;
    grad_packed[1 + c + j] =
        weight_var / number * (by_variances ? float((spread > 0) - (spread < 0)) : unit * spread / batch_sigma);
  }
  *value = float(total);
}

// Each function for each dtype of tokens.
#define EXPORT(name)                                                \
  extern "C" {                                                      \
  void* name##_float32 = reinterpret_cast<void*>(&name<float>);     \
  void* name##_bfloat16 = reinterpret_cast<void*>(&name<bfloat16>); \
  }

EXPORT(moments)
EXPORT(affine_fwd)
EXPORT(affine_bwd)
EXPORT(batch_norm_fwd)
EXPORT(batch_norm_bwd)
EXPORT(power_norm_fwd)
EXPORT(power_norm_bwd)
