// Depthwise convolution between two BatchNorms, forward and backward; depthwise_conv.py and mbconv.py have the
// equations. A task handles some images and a span of channels, row by row. The last K rows of activations (backward:
// of gradients) are in a cached buffer [row % K][vector][column][LANES] that includes the zero padding. So Swish is
// computed once per value, and the maps are read and written once, in order.
#pragma once

#include <cmath>
#include <optional>

#include "normalization.h"

namespace effnet {

constexpr int WIDEST = 8;  // most columns whose sums stay in registers
// The backward keeps 2 P + 2 K + 1 vectors: AVX-512 has 32 registers, the others 16.
template <int K>
constexpr int WIDEST_BACKWARD = LANES >= 16 ? 8 : K == 3 ? 4 : 2;
constexpr int64_t SPAN = 16;  // most vectors of channels in a task
constexpr int64_t BUFFER = 1 << 16;  // floats in a task's row buffer: 256 KiB
constexpr int64_t CHAIN = 256;  // pixels whose gradients of the taps are added one after the other
constexpr int64_t GROUPS = 16;  // most groups of images summed separately; independent of the thread count

struct ConvShape {
  int64_t n, c, h, w, ho, wo, k, stride, left, top;

  // Whether as many columns of zeros stand on the left as on the right, and the width stays.
  bool keeps_columns() const {
    return stride == 1 && left == k / 2 && wo == w;
  }
  // Images per group.
  Pieces groups() const {
    return {n, at::divup(n, std::min(n, GROUPS))};
  }
  // Channels per task, for rows of `columns` columns.
  Pieces channels(int64_t columns) const {
    return {c, std::clamp<int64_t>(BUFFER / (k * columns * LANES), 1, SPAN) * LANES};
  }
  // Rows per task: all, unless that gives too few tasks. Otherwise two tasks read the rows at their border.
  Pieces bands(int64_t rows, int64_t columns) const {
    const int64_t tasks = groups().count() * channels(columns).count();
    return {rows, tasks >= 8 ? rows : std::max<int64_t>(at::divup(rows * tasks, 8), std::min<int64_t>(rows, 8))};
  }
};

inline int64_t vectors(int64_t channels) {
  return at::divup(channels, LANES);
}

// Copies the taps [k * k, C] of channels begin to end to `packed`, [vector][k * k][LANES]. Returns `packed`.
template <int K>
inline const float* pack_taps(const float* taps, int64_t c, int64_t begin, int64_t end, float* packed) {
  for_blocks<1>(begin, end, [&](auto block) {
    float* to = packed + (block.c - begin) * K * K;
    for (int t = 0; t < K * K; ++t) store(to + t * LANES, block.load(taps + t * c, 0));
  });
  return packed;
}

// Columns that a strip of P outputs reads at stride 1. A strip as wide as the map (ALONE) skips the padding.
template <int K, int P, bool ALONE>
struct Columns {
  static constexpr int FIRST = ALONE ? K / 2 : 0, LAST = ALONE ? K / 2 + P : P + K - 1;
};

// Calls f(std::bool_constant<ALONE>) for a strip of P columns.
template <int S, int P, class F>
inline void by_padding(const ConvShape& shape, F&& f) {
  if constexpr (S == 1) {
    if (P == shape.w && shape.keeps_columns()) return f(std::true_type{});
  }
  f(std::false_type{});
}

// Sums of P adjacent outputs; rows[ty] + offset is the first input of the first of them, null if the row is 0; taps are
// packed.
template <int K, int S, int P, bool ALONE>
inline void convolve(const float* const* rows, int64_t offset, const float* taps, Vec* sums) {
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) sums[p] = Vec(0.f);
#pragma GCC unroll 8
  for (int ty = 0; ty < K; ++ty) {
    if (rows[ty] == nullptr) continue;
    const float* row = rows[ty] + offset;
    Vec t[K];
#pragma GCC unroll 8
    for (int tx = 0; tx < K; ++tx) t[tx] = load(taps + (ty * K + tx) * LANES);
    if constexpr (S == 1) {
#pragma GCC unroll 16
      for (int j = Columns<K, P, ALONE>::FIRST; j < Columns<K, P, ALONE>::LAST; ++j) {
        const Vec x = load(row + j * LANES);
#pragma GCC unroll 8
        for (int tx = 0; tx < K; ++tx) {
          if (j - tx >= 0 && j - tx < P) sums[j - tx] = fma(x, t[tx], sums[j - tx]);
        }
      }
    } else {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
        for (int tx = 0; tx < K; ++tx) sums[p] = fma(load(row + (p * S + tx) * LANES), t[tx], sums[p]);
      }
    }
  }
}

// `offset` floats into a row; null if the row is.
inline const float* row_of(const float* row, int64_t offset) {
  return row == nullptr ? nullptr : row + offset;
}

// f(first, std::integral_constant<int, P>) over [0, size) in strips of WIDEST, then half, then half of that, ...
template <int P = WIDEST, class F>
inline void for_strips(int64_t first, int64_t size, F&& f) {
  for (; first + P <= size; first += P) f(first, std::integral_constant<int, P>{});
  if constexpr (P > 1) {
    if (first < size) for_strips<P / 2>(first, size, f);
  }
}

// Fills a buffer row [vector][column][LANES] with silu(bn(x)), or x, of one row of the map: columns `from` to `until`,
// 0 in the padding.
template <class T>
inline void fill_activations(
    const T* x, const Norm* norm, int64_t c, int64_t begin, int64_t end, int64_t columns, int64_t from, int64_t until,
    float* row) {
  for (int64_t v = 0; v < vectors(end - begin); ++v) {
    float* at = row + v * columns * LANES;
    std::fill_n(at, from * LANES, 0.f);
    std::fill_n(at + until * LANES, (columns - until) * LANES, 0.f);
  }
  for_blocks<4>(begin, end, [&](auto block) {
    float* at = row + (block.c - begin) / LANES * columns * LANES;
    if (norm == nullptr) {
      for (int64_t j = from; j < until; ++j) {
        for (int u = 0; u < block.U; ++u) store(at + (u * columns + j) * LANES, block.load(x + (j - from) * c, u));
      }
      return;
    }
    const Normalize normalize(*norm, block);
    for (int64_t j = from; j < until; ++j) {
      for (int u = 0; u < block.U; ++u) {
        const Vec z = normalize(block.load(x + (j - from) * c, u), u);
        store(at + (u * columns + j) * LANES, z * sigmoid(z));
      }
    }
  });
}

// Sums of deviations from the first value; the moments are computed from them.
struct ShiftedSums {
  Vec shift, sum, square;
  void add(Vec value) {
    const Vec distance = value - shift;
    sum = sum + distance;
    square = fma(distance, distance, square);
  }
};

template <class T, int K, int S>
inline void depthwise_forward_tasks(
    const Tensor& x, const Tensor& taps, const Norm* norm, const Tensor& y, float* moments, const ConvShape& shape,
    int64_t columns) {
  const Pieces groups = shape.groups(), bands = shape.bands(shape.ho, columns), spans = shape.channels(columns);
  const int64_t c = shape.c, from = std::min(shape.left, columns), until = std::min(shape.left + shape.w, columns);
  const T* maps = data<T>(x);
  T* out = data<T>(y);
  const float* weights = data<float>(taps);
  run_tasks(groups.count() * bands.count() * spans.count(), [&](int64_t task) {
    const int64_t span = task % spans.count(), part = task / spans.count();
    const int64_t first = bands.begin(part % bands.count()), last = bands.end(part % bands.count());
    const int64_t group = part / bands.count(), begin = spans.begin(span), end = spans.end(span);
    const int64_t row_size = vectors(end - begin) * columns * LANES;
    float* buffer = scratch<0>(K * row_size);
    const float* packed = pack_taps<K>(weights, c, begin, end, scratch<1>(vectors(end - begin) * K * K * LANES));
    ShiftedSums sums_of[SPAN];
    for (int64_t n = groups.begin(group); n < groups.end(group); ++n) {
      int64_t filled = first * S;  // the first padded row that is not in the buffer yet
      const float* recent[K];  // the last K rows [row % K]; null outside the map
      for (int64_t ho = first; ho < last; ++ho) {
        for (filled = std::max(filled, ho * S); filled < ho * S + K; ++filled) {
          const int64_t hi = filled - shape.top;
          float* row = hi >= 0 && hi < shape.h ? buffer + filled % K * row_size : nullptr;
          recent[filled % K] = row;
          if (row == nullptr) continue;
          fill_activations<T>(
              maps + (n * shape.h + hi) * shape.w * c, norm, c, begin, end, columns, from, until, row);
        }
        T* line = out + (n * shape.ho + ho) * shape.wo * c;
        const bool fresh = n == groups.begin(group) && ho == first;
        for_blocks<1>(begin, end, [&](auto block) {
          const int64_t v = (block.c - begin) / LANES;
          const float* rows[K];
          for (int ty = 0; ty < K; ++ty) rows[ty] = row_of(recent[(ho * S + ty) % K], v * columns * LANES);
          ShiftedSums stats = sums_of[v];
          for_strips(0, shape.wo, [&](int64_t wo, auto width) {
            constexpr int P = decltype(width)::value;
            Vec sums[P];
            by_padding<S, P>(shape, [&](auto alone) {
              convolve<K, S, P, decltype(alone)::value>(rows, wo * S * LANES, packed + v * K * K * LANES, sums);
            });
            if (fresh && wo == 0) stats.shift = rounded<T>(sums[0]);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
              block.store(line + (wo + p) * c, 0, sums[p]);
              if (moments != nullptr) stats.add(rounded<T>(sums[p]));  // of y as rounded to storage
            }
          });
          sums_of[v] = stats;
        });
      }
    }
    if (moments == nullptr) return;
    const auto count = static_cast<float>((groups.end(group) - groups.begin(group)) * (last - first) * shape.wo);
    float* to = moments + part * 3 * c;
    for_blocks<1>(begin, end, [&](auto block) {
      const ShiftedSums& stats = sums_of[(block.c - begin) / LANES];
      const Vec mean = stats.sum * Vec(1.f / count);
      block.store(to, 0, Vec(count));
      block.store(to + c, 0, stats.shift + mean);
      block.store(to + 2 * c, 0, at::vec::maximum(Vec(0.f), stats.square - stats.sum * mean));
    });
  });
}

// Passes kernel size and stride as compile-time constants.
template <class F>
inline void by_kernel(int64_t k, int64_t stride, F&& f) {
  const auto with = [&](auto size) {
    if (stride == 1) f(size, std::integral_constant<int, 1>{});
    if (stride == 2) f(size, std::integral_constant<int, 2>{});
  };
  TORCH_CHECK((k == 3 || k == 5) && (stride == 1 || stride == 2), "kernel 3 or 5, stride 1 or 2");
  if (k == 3) with(std::integral_constant<int, 3>{});
  if (k == 5) with(std::integral_constant<int, 5>{});
}

inline int64_t kernel_size(const Tensor& taps) {
  return std::lround(std::sqrt(static_cast<double>(taps.size(0))));
}

// y and its moments [parts, 3, C], empty if not requested. `taps` [k * k, C] float32.
inline std::tuple<Tensor, Tensor> depthwise_forward(
    const Tensor& x, const Tensor& taps, int64_t stride, at::IntArrayRef padding, const std::optional<Tensor>& stats,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, bool with_moments) {
  const Map map(x);
  const int64_t k = kernel_size(taps), h = x.size(2), w = x.size(3);
  const int64_t ho = (h + padding[2] + padding[3] - k) / stride + 1, wo = (w + padding[0] + padding[1] - k) / stride + 1;
  const ConvShape shape{map.n, map.c, h, w, ho, wo, k, stride, padding[0], padding[2]};
  std::optional<Norm> norm;
  if (stats) norm.emplace(*stats, *weight, *bias);
  Tensor y = map_like(x, map.n, map.c, ho, wo);
  const int64_t columns = (wo - 1) * stride + k;
  const int64_t parts = shape.groups().count() * shape.bands(ho, columns).count();
  Tensor moments = floats({with_moments ? parts : 0, 3, map.c});
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    by_kernel(k, stride, [&](auto size, auto step) {
      depthwise_forward_tasks<T, decltype(size)::value, decltype(step)::value>(
          x, taps, norm ? &*norm : nullptr, y, with_moments ? data<float>(moments) : nullptr, shape, columns);
    });
    return 0;
  });
  return {y, moments};
}

// The gradient g at the convolution's output: dy itself, or computed from dy behind the gate (ApplySums).
struct OutputGradient {
  const Tensor& dy;
  const Tensor* d = nullptr;  // the convolution's output, if dy is the gradient after the gate
  const GradApply* apply = nullptr;
  const float* gate = nullptr;
  const float* dpool = nullptr;
};

// Fills row u of the gradients with zeros inserted between strides, [vector][column][LANES]. Column j is output column
// (left + j) / S. Returns `row`, or null if all of it is 0.
template <class T, int S>
inline const float* fill_gradients(
    const OutputGradient& gradient, const ConvShape& shape, int64_t n, int64_t u, int64_t begin, int64_t end,
    int64_t columns, float* row) {
  const int64_t c = shape.c, left = shape.left - (shape.k - 1);
  if (u < 0 || u % S != 0 || u / S >= shape.ho) return nullptr;
  const int64_t from = std::min(std::max<int64_t>(-left, 0), columns);
  const int64_t until = std::max(from, std::min(columns, (shape.wo - 1) * S + 1 - left));
  for (int64_t v = 0; v < vectors(end - begin); ++v) {
    float* at = row + v * columns * LANES;
    if (S > 1) {
      std::fill_n(at, columns * LANES, 0.f);
    } else {
      std::fill_n(at, from * LANES, 0.f);
      std::fill_n(at + until * LANES, (columns - until) * LANES, 0.f);
    }
  }
  const int64_t start = from + (S - (left + from) % S) % S, line = (n * shape.ho + u / S) * shape.wo * c;
  const T* dy = data<T>(gradient.dy) + line;
  for_blocks<2>(begin, end, [&](auto block) {
    float* at = row + (block.c - begin) / LANES * columns * LANES;
    if (gradient.d == nullptr) {
      for (int64_t j = start; j < until; j += S) {
        for (int i = 0; i < block.U; ++i) {
          store(at + (i * columns + j) * LANES, block.load(dy + (left + j) / S * c, i));
        }
      }
      return;  // this block
    }
    const T* d = data<T>(*gradient.d) + line;
    const ApplySums<decltype(block)> one(
        *gradient.apply, block, gradient.gate + n * c, gradient.dpool + n * c, shape.ho * shape.wo);
    for (int64_t j = start; j < until; j += S) {
      const int64_t pixel = (left + j) / S * c;
      for (int i = 0; i < block.U; ++i) {
        store(at + (i * columns + j) * LANES, one(block.load(dy + pixel, i), block.load(d + pixel, i), i));
      }
    }
  });
  return row;
}

// Gradients of P adjacent inputs and of the taps. rows[ty] + offset is the first gradient that contributes to the first
// input through row `ty` of the taps, null if the row is 0; column p + K - 1 - tx of it contributes to input p.
template <int K, int P, bool ALONE>
inline void convolve_backward(
    const float* const* rows, int64_t offset, const float* acts, const float* taps, Vec* dtap, Vec* sums) {
  Vec a[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    sums[p] = Vec(0.f);
    a[p] = load(acts + p * LANES);
  }
#pragma GCC unroll 8
  for (int ty = 0; ty < K; ++ty) {
    if (rows[ty] == nullptr) continue;
    const float* row = rows[ty] + offset;
    Vec t[K], dt[K];
#pragma GCC unroll 8
    for (int tx = 0; tx < K; ++tx) {
      t[tx] = load(taps + (ty * K + tx) * LANES);
      dt[tx] = dtap[ty * K + tx];
    }
#pragma GCC unroll 16
    for (int j = Columns<K, P, ALONE>::FIRST; j < Columns<K, P, ALONE>::LAST; ++j) {
      const Vec g = load(row + j * LANES);
#pragma GCC unroll 8
      for (int tx = 0; tx < K; ++tx) {
        const int p = j - (K - 1) + tx;
        if (p >= 0 && p < P) {
          sums[p] = fma(g, t[tx], sums[p]);
          dt[tx] = fma(g, a[p], dt[tx]);
        }
      }
    }
#pragma GCC unroll 8
    for (int tx = 0; tx < K; ++tx) dtap[ty * K + tx] = dt[tx];
  }
}

// The convolution's inputs, and the derivatives of Swish there, of one row of the map; [vector][column][LANES] each.
template <class T>
inline void fill_inputs(
    const T* x, const Norm* norm, int64_t c, int64_t begin, int64_t end, int64_t columns, float* acts, float* slopes) {
  for_blocks<2>(begin, end, [&](auto block) {
    const int64_t offset = (block.c - begin) * columns;
    if (norm == nullptr) {
      for (int64_t j = 0; j < columns; ++j) {
        for (int u = 0; u < block.U; ++u) store(acts + offset + (u * columns + j) * LANES, block.load(x + j * c, u));
      }
      return;
    }
    const Normalize normalize(*norm, block);
    for (int64_t j = 0; j < columns; ++j) {
      for (int u = 0; u < block.U; ++u) {
        const Vec z = normalize(block.load(x + j * c, u), u);
        const Vec s = sigmoid(z);
        const int64_t at = offset + (u * columns + j) * LANES;
        store(acts + at, z * s);
        store(slopes + at, silu_slope(z, s));
      }
    }
  });
}

// Sums of one vector of channels over a task's images.
template <int K>
struct GradientSums {
  Vec dtap[K * K], dz, dz_x;
  void add(const GradientSums& other) {
    for (int t = 0; t < K * K; ++t) dtap[t] = dtap[t] + other.dtap[t];
    dz = dz + other.dz;
    dz_x = dz_x + other.dz_x;
  }
};

template <class T, int K, int S>
inline void depthwise_backward_tasks(
    const OutputGradient& gradient, const Tensor& x, const Tensor& taps, const Norm* norm, const Tensor& dx,
    float* dw, float* sums, const ConvShape& shape, int64_t columns) {
  const Pieces groups = shape.groups(), bands = shape.bands(shape.h, columns), spans = shape.channels(columns);
  const int64_t c = shape.c, w = shape.w;
  const T* maps = data<T>(x);
  T* out = data<T>(dx);
  const float* weights = data<float>(taps);
  run_tasks(groups.count() * bands.count() * spans.count(), [&](int64_t task) {
    const int64_t span = task % spans.count(), part = task / spans.count();
    const int64_t first = bands.begin(part % bands.count()), last = bands.end(part % bands.count());
    const int64_t group = part / bands.count(), begin = spans.begin(span), end = spans.end(span);
    const int64_t row_size = vectors(end - begin) * columns * LANES;
    const int64_t inputs = vectors(end - begin) * w * LANES;
    float* buffer = scratch<0>(K * row_size + 2 * inputs);
    float* acts = buffer + K * row_size;
    float* slopes = acts + inputs;
    const float* packed = pack_taps<K>(weights, c, begin, end, scratch<1>(vectors(end - begin) * K * K * LANES));
    GradientSums<K> group_sums[SPAN], chain_sums[SPAN];  // chains of about CHAIN pixels, so that they stay short
    const int64_t images = std::max<int64_t>(CHAIN / ((last - first) * w), 1);  // in a chain
    for (int64_t n = groups.begin(group); n < groups.end(group); ++n) {
      // Padded row r of the gradients is row r + top - (K - 1) of those with inserted zeros. Rows hi to hi + K - 1
      // contribute to input row hi.
      int64_t filled = first;
      const float* recent[K];  // the last K rows [row % K]; null where all of a row is 0
      for (int64_t hi = first; hi < last; ++hi) {
        for (; filled < hi + K; ++filled) {
          recent[filled % K] = fill_gradients<T, S>(
              gradient, shape, n, filled + shape.top - (K - 1), begin, end, columns, buffer + filled % K * row_size);
        }
        const int64_t line = (n * shape.h + hi) * w * c;
        fill_inputs(maps + line, norm, c, begin, end, w, acts, slopes);
        for_blocks<1>(begin, end, [&](auto block) {
          const int64_t v = (block.c - begin) / LANES;
          const float *act = acts + v * w * LANES, *slope = slopes + v * w * LANES;
          const float* rows[K];
          for (int ty = 0; ty < K; ++ty) rows[ty] = row_of(recent[(hi + K - 1 - ty) % K], v * columns * LANES);
          GradientSums<K>& sum = chain_sums[v];
          const Vec mean = norm ? block.load(norm->mean, 0) : Vec(0.f);
          Vec dz = sum.dz, dz_x = sum.dz_x;
          for_strips<WIDEST_BACKWARD<K>>(0, w, [&](int64_t wi, auto width) {
            constexpr int P = decltype(width)::value;
            Vec da[P];
            by_padding<S, P>(shape, [&](auto alone) {
              convolve_backward<K, P, decltype(alone)::value>(
                  rows, wi * LANES, act + wi * LANES, packed + v * K * K * LANES, sum.dtap, da);
            });
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
              if (norm != nullptr) {
                da[p] = da[p] * load(slope + (wi + p) * LANES);
                dz = dz + da[p];
                dz_x = fma(da[p], block.load(maps + line + (wi + p) * c, 0) - mean, dz_x);
              }
              block.store(out + line + (wi + p) * c, 0, da[p]);
            }
          });
          sum.dz = dz;
          sum.dz_x = dz_x;
        });
      }
      const int64_t done = n + 1 - groups.begin(group);
      if (done % images != 0 && n + 1 < groups.end(group)) continue;
      for (int64_t v = 0; v < vectors(end - begin); ++v) {
        group_sums[v].add(chain_sums[v]);
        chain_sums[v] = {};
      }
    }
    for_blocks<1>(begin, end, [&](auto block) {
      const GradientSums<K>& sum = group_sums[(block.c - begin) / LANES];
      for (int t = 0; t < K * K; ++t) block.store(dw + (part * K * K + t) * c, 0, sum.dtap[t]);
      if (norm != nullptr) {
        block.store(sums + part * 2 * c, 0, sum.dz);
        block.store(sums + (part * 2 + 1) * c, 0, sum.dz_x * block.load(norm->rstd, 0));
      }
    });
  });
}

// dx and dw [k * k, C]. With a norm: dz instead of dx, and the sums [2, C] of dz and dz xhat over this rank.
inline std::tuple<Tensor, Tensor, Tensor> depthwise_backward(
    const OutputGradient& gradient, const Tensor& x, const Tensor& taps, int64_t stride, at::IntArrayRef padding,
    const Norm* norm) {
  const Map map(x);
  const int64_t k = kernel_size(taps), h = x.size(2), w = x.size(3);
  const ConvShape shape{
      map.n, map.c, h, w, gradient.dy.size(2), gradient.dy.size(3), k, stride, padding[0], padding[2]};
  const int64_t columns = w + k - 1, parts = shape.groups().count() * shape.bands(h, columns).count();
  Tensor dx = like(x), dw = floats({parts, k * k, map.c}), sums = floats({norm ? parts : 0, 2, map.c});
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    by_kernel(k, stride, [&](auto size, auto step) {
      depthwise_backward_tasks<T, decltype(size)::value, decltype(step)::value>(
          gradient, x, taps, norm, dx, data<float>(dw), data<float>(sums), shape, columns);
    });
    return 0;
  });
  return {dx, ordered_sum(dw), norm ? ordered_sum(sums) : floats({0})};
}

}  // namespace effnet
