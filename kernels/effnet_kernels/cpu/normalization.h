// BatchNorm, Swish, the residual and the spatial mean over channels-last maps; the gradient of each.
// batch_norm.py and bn_silu_squeeze.py have the equations.
#pragma once

#include "vec.h"

namespace effnet {

// Parameters of a normalisation: statistics [4, C] (mean, rstd, unbiased variance, count), gamma and beta, float32.
struct Norm {
  Tensor stats, gains, biases;
  int64_t c;
  const float *mean, *rstd, *gain, *beta;  // gain = gamma rstd
  float count;
  Norm(const Tensor& statistics, const Tensor& weight, const Tensor& bias)
      : stats(statistics.contiguous()), gains(weight.detach().to(at::kFloat) * stats[1]),
        biases(bias.detach().to(at::kFloat).contiguous()), c(stats.size(1)), mean(stats.const_data_ptr<float>()),
        rstd(mean + c), gain(gains.const_data_ptr<float>()), beta(biases.const_data_ptr<float>()), count(mean[3 * c]) {}
};

// z = gamma xhat + beta of U vectors of channels.
template <class B>
struct Normalize {
  Vec mean[B::U], gain[B::U], beta[B::U];
  Normalize(const Norm& norm, B block) {
    for (int u = 0; u < B::U; ++u) {
      mean[u] = block.load(norm.mean, u);
      gain[u] = block.load(norm.gain, u);
      beta[u] = block.load(norm.beta, u);
    }
  }
  // Not x gain + shift: with a mean of 1000 deviations that sum would cancel.
  Vec operator()(Vec x, int u) const {
    return fma(x - mean[u], gain[u], beta[u]);
  }
};

// Writes count, mean and M2 of `rows` rows of `width` channels, `stride` apart, to `out`, with C between them. Sums are
// of deviations from the first row, which is only a few standard deviations from the mean.
template <class T>
inline void tile_moments(const T* x, int64_t rows, int64_t c, float* out) {
  for_blocks<4>(0, c, [&](auto block) {
    Vec first[block.U], sum[block.U], square[block.U];
    for (int u = 0; u < block.U; ++u) first[u] = block.load(x, u);
    for (int64_t r = 0; r < rows; ++r) {
      for (int u = 0; u < block.U; ++u) {
        const Vec distance = block.load(x + r * c, u) - first[u];
        sum[u] = sum[u] + distance;
        square[u] = fma(distance, distance, square[u]);
      }
    }
    const Vec count(static_cast<float>(rows)), share(1.f / static_cast<float>(rows));
    for (int u = 0; u < block.U; ++u) {
      const Vec mean = sum[u] * share;
      block.store(out, u, count);
      block.store(out + c, u, first[u] + mean);
      block.store(out + 2 * c, u, at::vec::maximum(Vec(0.f), square[u] - sum[u] * mean));
    }
  });
}

inline Tensor moments(const Tensor& x) {
  const Map map(x);
  const Pieces tiles = row_tiles(map.rows(), map.c);
  Tensor out = floats({tiles.count(), 3, map.c});
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(tiles.count(), [&](int64_t i) {
      const int64_t begin = tiles.begin(i);
      tile_moments(data<T>(x) + begin * map.c, tiles.end(i) - begin, map.c, data<float>(out) + i * 3 * map.c);
    });
    return 0;
  });
  return out;
}

// Moments [G, 3, C] merged in order by Chan's formula, in float64: [3, C] moments, or [4, C] statistics if `final`.
inline Tensor merge_moments(const Tensor& moments, double eps, bool final) {
  const int64_t groups = moments.size(0), c = moments.size(2);
  Tensor out = floats({final ? 4 : 3, c});
  const float* from = moments.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  Pieces spans{c, 64};
  run_tasks(spans.count(), [&](int64_t i) {
    const int64_t begin = spans.begin(i), width = spans.end(i) - begin;
    double count[64] = {}, mean[64] = {}, m2[64] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const float* at = from + g * 3 * c + begin;
      for (int64_t j = 0; j < width; ++j) {
        count[j] += at[j];
        mean[j] += static_cast<double>(at[j]) * at[c + j];
      }
    }
    for (int64_t j = 0; j < width; ++j) mean[j] /= std::max(count[j], 1.);
    for (int64_t g = 0; g < groups; ++g) {
      const float* at = from + g * 3 * c + begin;
      for (int64_t j = 0; j < width; ++j) {
        const double distance = at[c + j] - mean[j];
        m2[j] += at[2 * c + j] + at[j] * distance * distance;
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      float* at = to + begin + j;
      if (final) {
        at[0] = mean[j];
        at[c] = 1. / std::sqrt(m2[j] / std::max(count[j], 1.) + eps);
        at[2 * c] = m2[j] / std::max(count[j] - 1., 1.);
        at[3 * c] = count[j];
      } else {
        at[0] = count[j];
        at[c] = mean[j];
        at[2 * c] = m2[j];
      }
    }
  });
  return out;
}

// y = scale[n] act(z) + residual.
inline Tensor normalize(
    const Tensor& x, const Tensor& stats, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& residual, const std::optional<Tensor>& sample_scale, bool activation) {
  const Map map(x);
  const Norm norm(stats, weight, bias);
  const Tensor scales = sample_scale ? sample_scale->detach().to(at::kFloat).contiguous() : Tensor();
  const float* scale = scales.defined() ? data<float>(scales) : nullptr;
  Tensor y = like(x);
  const Pieces tiles = row_tiles(map.rows(), map.c);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* added = residual ? data<T>(*residual) : nullptr;
    run_tasks(tiles.count(), [&](int64_t i) {
      for (int64_t r = tiles.begin(i); r < tiles.end(i); ++r) {
        const T* from = data<T>(x) + r * map.c;
        T* to = data<T>(y) + r * map.c;
        const Vec factor(scale ? scale[r / map.hw] : 1.f);
        for_blocks<1>(0, map.c, [&](auto block) {
          const Normalize normalize(norm, block);
          Vec v = normalize(block.load(from, 0), 0);
          if (activation) v = v * sigmoid(v);
          if (scale) v = v * factor;
          if (added) v = v + block.load(added + r * map.c, 0);
          block.store(to, 0, v);
        });
      }
    });
    return 0;
  });
  return y;
}

// Sums [2, C] of dz and dz xhat over this rank.
inline Tensor grad_sums(
    const Tensor& dy, const Tensor& x, const Tensor& stats, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& sample_scale, bool activation) {
  const Map map(x);
  const Norm norm(stats, weight, bias);
  const Tensor scales = sample_scale ? sample_scale->detach().to(at::kFloat).contiguous() : Tensor();
  const float* scale = scales.defined() ? data<float>(scales) : nullptr;
  const Pieces tiles = row_tiles(map.rows(), map.c);
  Tensor parts = floats({tiles.count(), 2, map.c});
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(tiles.count(), [&](int64_t i) {
      float* out = data<float>(parts) + i * 2 * map.c;
      for_blocks<2>(0, map.c, [&](auto block) {
        const Normalize normalize(norm, block);
        Vec sum[block.U], product[block.U];
        for (int64_t r = tiles.begin(i); r < tiles.end(i); ++r) {
          const Vec factor(scale ? scale[r / map.hw] : 1.f);
          for (int u = 0; u < block.U; ++u) {
            const Vec value = block.load(data<T>(x) + r * map.c, u);
            Vec dz = block.load(data<T>(dy) + r * map.c, u) * factor;
            if (activation) {
              const Vec z = normalize(value, u);
              dz = dz * silu_slope(z, sigmoid(z));
            }
            sum[u] = sum[u] + dz;
            product[u] = fma(dz, value - normalize.mean[u], product[u]);
          }
        }
        for (int u = 0; u < block.U; ++u) {
          block.store(out, u, sum[u]);
          block.store(out + map.c, u, product[u] * block.load(norm.rstd, u));
        }
      });
    });
    return 0;
  });
  return ordered_sum(parts);
}

// dx = gamma rstd (dz - mean_dz - xhat mean_dz_xhat), given the sums over all ranks.
struct GradApply {
  const Norm& norm;
  Tensor offsets, slopes;
  const float *offset, *slope;
  GradApply(const Norm& norm, const Tensor& sums)
      : norm(norm), offsets(sums[0] / norm.count), slopes(sums[1] / norm.count * norm.stats[1]),
        offset(offsets.const_data_ptr<float>()), slope(slopes.const_data_ptr<float>()) {}
  template <class B>
  struct At {
    Normalize<B> normalize;
    Vec slope[B::U], offset[B::U];
    At(const GradApply& apply, B block) : normalize(apply.norm, block) {
      for (int u = 0; u < B::U; ++u) {
        offset[u] = block.load(apply.offset, u);
        slope[u] = block.load(apply.slope, u);
      }
    }
    Vec operator()(Vec dz, Vec x, int u) const {
      return normalize.gain[u] * (dz - offset[u] - (x - normalize.mean[u]) * slope[u]);
    }
  };
};

// Writes rows begin to end of dx to `out`; dy may be dz itself (activation = false).
template <class T, class O>
inline void grad_apply_rows(
    const T* dy, const T* x, const GradApply& apply, const float* scale, bool activation, int64_t hw, int64_t c,
    int64_t begin, int64_t end, O* out) {
  for (int64_t r = begin; r < end; ++r) {
    const Vec factor(scale ? scale[r / hw] : 1.f);
    for_blocks<1>(0, c, [&](auto block) {
      const GradApply::At<decltype(block)> at(apply, block);
      const Vec value = block.load(x + r * c, 0);
      Vec dz = block.load(dy + r * c, 0);
      if (scale) dz = dz * factor;
      if (activation) {
        const Vec z = at.normalize(value, 0);
        dz = dz * silu_slope(z, sigmoid(z));
      }
      block.store(out + (r - begin) * c, 0, at(dz, value, 0));
    });
  }
}

inline Tensor grad_apply(
    const Tensor& dy, const Tensor& x, const Tensor& stats, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& sample_scale, const Tensor& sums, bool activation) {
  const Map map(x);
  const Norm norm(stats, weight, bias);
  const GradApply apply(norm, sums);
  const Tensor scales = sample_scale ? sample_scale->detach().to(at::kFloat).contiguous() : Tensor();
  const float* scale = scales.defined() ? data<float>(scales) : nullptr;
  Tensor dx = like(x);
  const Pieces tiles = row_tiles(map.rows(), map.c);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(tiles.count(), [&](int64_t i) {
      grad_apply_rows(
          data<T>(dy), data<T>(x), apply, scale, activation, map.hw, map.c, tiles.begin(i), tiles.end(i),
          data<T>(dx) + tiles.begin(i) * map.c);
    });
    return 0;
  });
  return dx;
}

// A task of the passes below handles CHANNELS channels of one image, ROWS rows at a time. With few rows, memory is read
// in long pieces although the sums of each block of channels stay in registers.
constexpr int64_t CHANNELS = 16 * LANES, ROWS = 16;

// pool [N, C] = mean over h, w of silu(z), float32.
inline Tensor squeeze(const Tensor& x, const Tensor& stats, const Tensor& weight, const Tensor& bias) {
  const Map map(x);
  const Norm norm(stats, weight, bias);
  Tensor pool = floats({map.n, map.c});
  const Pieces spans{map.c, CHANNELS};
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(map.n * spans.count(), [&](int64_t task) {
      const int64_t n = task / spans.count(), span = task % spans.count();
      const T* image = data<T>(x) + n * map.hw * map.c;
      const float share = 1.f / static_cast<float>(map.hw);
      float* out = data<float>(pool) + n * map.c;
      for (int64_t first = 0; first < map.hw; first += ROWS) {
        const int64_t last = std::min(first + ROWS, map.hw);
        for_blocks<4>(spans.begin(span), spans.end(span), [&](auto block) {
          const Normalize normalize(norm, block);
          Vec sum[block.U];
          for (int64_t r = first; r < last; ++r) {
            for (int u = 0; u < block.U; ++u) {
              const Vec z = normalize(block.load(image + r * map.c, u), u);
              sum[u] = fma(z, sigmoid(z), sum[u]);
            }
          }
          for (int u = 0; u < block.U; ++u) {
            const Vec before = first == 0 ? Vec(0.f) : block.load(out, u);
            block.store(out, u, fma(sum[u], Vec(share), before));
          }
        });
      }
    });
    return 0;
  });
  return pool;
}

// Writes rows begin to end of silu(z) gate[n] to `out`.
template <class T, class O>
inline void excite_rows(
    const T* x, const Norm& norm, const float* gate, int64_t hw, int64_t c, int64_t begin, int64_t end, O* out) {
  for (int64_t r = begin; r < end; ++r) {
    const float* gates = gate + r / hw * c;
    for_blocks<1>(0, c, [&](auto block) {
      const Normalize normalize(norm, block);
      const Vec z = normalize(block.load(x + r * c, 0), 0);
      block.store(out + (r - begin) * c, 0, z * sigmoid(z) * block.load(gates, 0));
    });
  }
}

inline Tensor excite(
    const Tensor& x, const Tensor& stats, const Tensor& weight, const Tensor& bias, const Tensor& gate) {
  const Map map(x);
  const Norm norm(stats, weight, bias);
  Tensor y = like(x);
  const Pieces tiles = row_tiles(map.rows(), map.c);
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(tiles.count(), [&](int64_t i) {
      excite_rows(
          data<T>(x), norm, gate.const_data_ptr<float>(), map.hw, map.c, tiles.begin(i), tiles.end(i),
          data<T>(y) + tiles.begin(i) * map.c);
    });
    return 0;
  });
  return y;
}

// Sums over `rows` rows of one image, channels [first, last), of: dy silu(z), dy slope, dy slope xhat, slope,
// slope xhat, written to `sums`, `apart` floats apart. Also writes silu(z) gate to `y`, if given.
template <class T>
inline void five_sums_rows(
    const T* dy, const T* x, const Norm& norm, int64_t rows, int64_t first, int64_t last, float* sums, int64_t apart,
    const float* gate, float* y) {
  const int64_t c = norm.c;
  for (int64_t begin = 0; begin < rows; begin += ROWS) {
    const int64_t end = std::min(begin + ROWS, rows);
    for_blocks<2>(first, last, [&](auto block) {
      const Normalize normalize(norm, block);
      Vec dy_act[block.U], dy_slope[block.U], dy_slope_x[block.U], slope_sum[block.U], slope_x[block.U];
      for (int64_t r = begin; r < end; ++r) {
        for (int u = 0; u < block.U; ++u) {
          const Vec value = block.load(x + r * c, u);
          const Vec distance = value - normalize.mean[u];
          const Vec z = fma(distance, normalize.gain[u], normalize.beta[u]);
          const Vec s = sigmoid(z);
          const Vec slope = silu_slope(z, s);
          slope_sum[u] = slope_sum[u] + slope;
          slope_x[u] = fma(slope, distance, slope_x[u]);
          if (dy != nullptr) {
            const Vec g = block.load(dy + r * c, u);
            const Vec act = z * s;
            const Vec g_slope = g * slope;
            dy_act[u] = fma(g, act, dy_act[u]);
            dy_slope[u] = dy_slope[u] + g_slope;
            dy_slope_x[u] = fma(g_slope, distance, dy_slope_x[u]);
            if (y != nullptr) block.store(y + r * c, u, act * block.load(gate, u));
          }
        }
      }
      for (int u = 0; u < block.U; ++u) {
        const Vec rstd = block.load(norm.rstd, u);
        float* at = sums;
        const auto add = [&](Vec sum) {
          block.store(at, u, begin == 0 ? sum : sum + block.load(at, u));
          at += apart;
        };
        if (dy != nullptr) {
          add(dy_act[u]);
          add(dy_slope[u]);
          add(dy_slope_x[u] * rstd);
        }
        add(slope_sum[u]);
        add(slope_x[u] * rstd);
      }
    });
  }
}

// All five sums [5, N, C]; without dy the last two, [2, N, C].
inline Tensor five_sums(
    const std::optional<Tensor>& dy, const Tensor& x, const Tensor& stats, const Tensor& weight, const Tensor& bias) {
  const Map map(x);
  const Norm norm(stats, weight, bias);
  Tensor sums = floats({dy ? 5 : 2, map.n, map.c});
  const Pieces spans{map.c, CHANNELS};
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(map.n * spans.count(), [&](int64_t task) {
      const int64_t n = task / spans.count(), span = task % spans.count(), at = n * map.hw * map.c;
      five_sums_rows<T>(
          dy ? data<T>(*dy) + at : nullptr, data<T>(x) + at, norm, map.hw, spans.begin(span), spans.end(span),
          data<float>(sums) + n * map.c, map.n * map.c, nullptr, nullptr);
    });
    return 0;
  });
  return sums;
}

// dx from the gradient dpool [N, C] at the mean and, with a gate [N, C], from dy at y = silu(z) gate.
template <class B>
struct ApplySums {
  GradApply::At<B> at;
  Vec gate[B::U], from_pool[B::U];
  // gate may be null: then there is no dy.
  ApplySums(const GradApply& apply, B block, const float* gates, const float* dpool, int64_t hw) : at(apply, block) {
    for (int u = 0; u < B::U; ++u) {
      gate[u] = gates ? block.load(gates, u) : Vec(0.f);
      from_pool[u] = block.load(dpool, u) * Vec(1.f / static_cast<float>(hw));
    }
  }
  Vec operator()(Vec dy, Vec x, int u) const {
    const Vec z = at.normalize(x, u);
    return at(silu_slope(z, sigmoid(z)) * fma(dy, gate[u], from_pool[u]), x, u);
  }
};

inline Tensor apply_sums(
    const std::optional<Tensor>& dy, const Tensor& x, const Tensor& stats, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& gate, const Tensor& dpool, const Tensor& sums) {
  const Map map(x);
  const Norm norm(stats, weight, bias);
  const GradApply apply(norm, sums);
  Tensor dx = like(x);
  const Pieces spans{map.c, CHANNELS};
  by_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_tasks(map.n * spans.count(), [&](int64_t task) {
      const int64_t n = task / spans.count(), span = task % spans.count(), at = n * map.hw * map.c;
      const T* g = dy ? data<T>(*dy) + at : nullptr;
      for (int64_t first = 0; first < map.hw; first += ROWS) {
        for_blocks<2>(spans.begin(span), spans.end(span), [&](auto block) {
          const float* gates = gate ? data<float>(*gate) + n * map.c : nullptr;
          const ApplySums<decltype(block)> one(apply, block, gates, data<float>(dpool) + n * map.c, map.hw);
          for (int64_t r = first; r < std::min(first + ROWS, map.hw); ++r) {
            for (int u = 0; u < block.U; ++u) {
              const Vec grad = g ? block.load(g + r * map.c, u) : Vec(0.f);
              block.store(data<T>(dx) + at + r * map.c, u, one(grad, block.load(data<T>(x) + at + r * map.c, u), u));
            }
          }
        });
      }
    });
    return 0;
  });
  return dx;
}

}  // namespace effnet
