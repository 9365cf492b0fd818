// The 1x1 convolutions of an MBConv block as matrix products over [N H W, C], tile by tile. The operations before and
// after a product run while its tile of rows is in the cache, so the normalised maps and the gradients at the
// convolutions' outputs are never written. float32; each product is a PyTorch call on one thread.
#pragma once

#include "normalization.h"

namespace effnet {

// [out, in, 1, 1] as [out, in].
inline Tensor as_matrix(const Tensor& weight) {
  return weight.detach().reshape({weight.size(0), weight.size(1)});
}

// A weight's transpose [in, out]; copied where the product is too small to hide the strided reads.
inline Tensor transposed(const Tensor& weight) {
  const Tensor t = as_matrix(weight).t();
  return weight.numel() < 80 * 480 ? t.contiguous() : t;
}

// Sums over the rows. Each chain of tiles sums in order, and the chains' sums are added in order at the end. With no
// chain, the whole maps are kept and one product over all rows follows: less traffic if there are few rows.
inline int64_t chains(const Pieces& tiles, int64_t narrow) {
  const int64_t most = std::min<int64_t>({tiles.count(), 16, tiles.total / (2 * narrow)});
  return most >= 4 ? most : 0;
}

// a^T b [m, k] of a [rows, m] and b [rows, k]; each thread computes some rows of the result.
inline Tensor transposed_product(const Tensor& a, const Tensor& b) {
  Tensor out = floats({a.size(1), b.size(1)});
  const Pieces blocks{a.size(1), std::max<int64_t>(at::divup(a.size(1), 8), 32)};
  run_tasks(blocks.count(), [&](int64_t i) {
    const int64_t begin = blocks.begin(i), size = blocks.end(i) - begin;
    Tensor rows = out.narrow(0, begin, size);
    at::mm_out(rows, a.narrow(1, begin, size).t(), b);
  });
  return out;
}

// y = x W^T over the pixels, [N, C', H, W], and the moments [tiles, 3, C'] of y.
inline std::tuple<Tensor, Tensor> conv_moments(const Tensor& x, const Tensor& weight) {
  const Map map(x);
  const int64_t outputs = weight.size(0);
  const Tensor w = transposed(weight);
  Tensor y = map_like(x, map.n, outputs, x.size(2), x.size(3));
  const Pieces tiles = row_tiles(map.rows(), std::max(outputs, map.c));
  Tensor moments = floats({tiles.count(), 3, outputs});
  run_tasks(tiles.count(), [&](int64_t i) {
    const int64_t begin = tiles.begin(i), rows = tiles.end(i) - begin;
    float* to = data<float>(y) + begin * outputs;
    Tensor out = matrix(to, rows, outputs, outputs);
    at::mm_out(out, matrix(data<float>(x) + begin * map.c, rows, map.c, map.c), w);
    tile_moments(to, rows, outputs, data<float>(moments) + i * 3 * outputs);
  });
  return {y, moments};
}

// p = (silu(bn(d)) gate) W^T and the moments of p.
inline std::tuple<Tensor, Tensor> excite_conv_moments(
    const Tensor& d, const Tensor& stats, const Tensor& weight, const Tensor& bias, const Tensor& gate,
    const Tensor& project) {
  const Map map(d);
  const Norm norm(stats, weight, bias);
  const int64_t outputs = project.size(0);
  const Tensor w = transposed(project);
  Tensor p = map_like(d, map.n, outputs, d.size(2), d.size(3));
  const Pieces tiles = row_tiles(map.rows(), map.c);
  Tensor moments = floats({tiles.count(), 3, outputs});
  run_tasks(tiles.count(), [&](int64_t i) {
    const int64_t begin = tiles.begin(i), rows = tiles.end(i) - begin;
    float* y = scratch<0>(rows * map.c);
    excite_rows(data<float>(d), norm, data<float>(gate), map.hw, map.c, begin, tiles.end(i), y);
    float* to = data<float>(p) + begin * outputs;
    Tensor out = matrix(to, rows, outputs, outputs);
    at::mm_out(out, matrix(y, rows, map.c, map.c), w);
    tile_moments(to, rows, outputs, data<float>(moments) + i * 3 * outputs);
  });
  return {p, moments};
}

// Backward of the projection: from the gradient dout after its BatchNorm, whose sums over all ranks are `sums`, to
// dy [N, C, H, W] after the gate, dW [C', C], and the five sums [5, N, C].
inline std::tuple<Tensor, Tensor, Tensor> project_backward(
    const Tensor& dout, const Tensor& p, const Tensor& stats3, const Tensor& weight3, const Tensor& bias3,
    const std::optional<Tensor>& sample_scale, const Tensor& sums, const Tensor& project, const Tensor& d,
    const Tensor& stats, const Tensor& weight, const Tensor& bias, const Tensor& gate) {
  const Map map(d);
  const Norm norm(stats, weight, bias), norm3(stats3, weight3, bias3);
  const GradApply apply(norm3, sums);
  const int64_t outputs = p.size(1), c = map.c, hw = map.hw;
  const Tensor scales = sample_scale ? sample_scale->detach().to(at::kFloat).contiguous() : Tensor();
  const float* scale = scales.defined() ? data<float>(scales) : nullptr;
  const Tensor w = as_matrix(project).contiguous();
  Tensor dy = like(d);
  // A tile is several whole images, or a piece of one.
  const Pieces rows_of = row_tiles(map.rows(), c);
  const int64_t images = std::max<int64_t>(rows_of.size / hw, 1);
  const Pieces within{hw, at::divup(hw, at::divup(hw, rows_of.size))};
  const int64_t groups = at::divup(map.n, images), count = within.count();
  const int64_t tiles = groups * count, chain = chains({map.rows(), at::divup(map.rows(), tiles)}, outputs);
  const int64_t tasks = chain ? std::min(chain, tiles) : tiles;
  Tensor five = floats({count, 5, map.n, c});
  Tensor dps = chain ? Tensor() : floats({map.rows(), outputs}), ys = chain ? Tensor() : floats({map.rows(), c});
  Tensor dw = floats({chain ? tasks : 0, outputs, c});
  const int64_t longest = images > 1 ? images * hw : within.size;
  run_tasks(tasks, [&](int64_t task) {
    float* y_tile = chain ? scratch<0>(longest * c) : nullptr;
    float* dp_tile = chain ? scratch<1>(longest * outputs) : nullptr;
    const int64_t first = task * tiles / tasks, last = (task + 1) * tiles / tasks;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t image = tile / count * images, piece = tile % count;
      const int64_t until = std::min(image + images, map.n);
      const int64_t begin = image * hw + within.begin(piece), end = (until - 1) * hw + within.end(piece), rows = end - begin;
      float* dp = chain ? dp_tile : data<float>(dps) + begin * outputs;
      float* y = chain ? y_tile : data<float>(ys) + begin * c;
      grad_apply_rows(data<float>(dout), data<float>(p), apply, scale, false, hw, outputs, begin, end, dp);
      const Tensor dp_rows = matrix(dp, rows, outputs, outputs);
      float* to = data<float>(dy) + begin * c;
      Tensor out = matrix(to, rows, c, c);
      at::mm_out(out, dp_rows, w);
      for (int64_t n = image; n < until; ++n) {
        const int64_t at = n == image ? 0 : n * hw - begin, size = within.end(piece) - within.begin(piece);
        five_sums_rows<float>(
            to + at * c, data<float>(d) + (begin + at) * c, norm, size, 0, c,
            data<float>(five) + (piece * 5 * map.n + n) * c, map.n * c, data<float>(gate) + n * c, y + at * c);
      }
      if (chain) {
        Tensor part = dw[task];
        if (tile == first) {
          at::mm_out(part, dp_rows.t(), matrix(y, rows, c, c));
        } else {
          part.addmm_(dp_rows.t(), matrix(y, rows, c, c));
        }
      }
    }
  });
  return {dy, chain ? ordered_sum(dw) : transposed_product(dps, ys), count == 1 ? five[0] : ordered_sum(five)};
}

// Backward of the expansion: from dz after its BatchNorm, given the sums over all ranks, to dx (plus `residual`)
// and dW [C, C''].
inline std::tuple<Tensor, Tensor> expand_backward(
    const Tensor& dz, const Tensor& e, const Tensor& stats, const Tensor& weight, const Tensor& bias,
    const Tensor& sums, const Tensor& x, const Tensor& expand, const std::optional<Tensor>& residual) {
  const Map map(e);
  const Norm norm(stats, weight, bias);
  const GradApply apply(norm, sums);
  const int64_t inputs = x.size(1), c = map.c;
  const Tensor w = as_matrix(expand).contiguous();
  Tensor dx = like(x);
  const Pieces tiles = row_tiles(map.rows(), c);
  const int64_t chain = chains(tiles, inputs), tasks = chain ? chain : tiles.count();
  Tensor des = chain ? Tensor() : floats({map.rows(), c});
  Tensor dw = floats({chain, inputs, c});
  run_tasks(tasks, [&](int64_t task) {
    float* tile_of = chain ? scratch<0>(tiles.size * c) : nullptr;
    const int64_t first = task * tiles.count() / tasks, last = (task + 1) * tiles.count() / tasks;
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tiles.begin(tile), end = tiles.end(tile), rows = end - begin;
      float* de = chain ? tile_of : data<float>(des) + begin * c;
      grad_apply_rows(data<float>(dz), data<float>(e), apply, nullptr, false, map.hw, c, begin, end, de);
      const Tensor de_rows = matrix(de, rows, c, c);
      float* to = data<float>(dx) + begin * inputs;
      Tensor out = matrix(to, rows, inputs, inputs);
      at::mm_out(out, de_rows, w);
      if (residual) {
        const float* added = data<float>(*residual) + begin * inputs;
        for_blocks<4>(0, rows * inputs, [&](auto block) {
          for (int u = 0; u < block.U; ++u) block.store(to, u, block.load(to, u) + block.load(added, u));
        });
      }
      if (chain) {
        const Tensor x_rows = matrix(data<float>(x) + begin * inputs, rows, inputs, inputs).t();
        Tensor part = dw[task];
        if (tile == first) {
          at::mm_out(part, x_rows, de_rows);
        } else {
          part.addmm_(x_rows, de_rows);
        }
      }
    }
  });
  if (chain) return {dx, ordered_sum(dw).t().contiguous()};
  return {dx, transposed_product(des, matrix(data<float>(x), map.rows(), inputs, inputs))};
}

// gate [N, C] = sigmoid(W2 silu(hidden) + b2) and hidden [N, R] = W1 pool + b1.
inline std::tuple<Tensor, Tensor> gate_forward(
    const Tensor& pool, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const Tensor down = as_matrix(w1).to(at::kFloat).t(), up = as_matrix(w2).to(at::kFloat).t();
  const Tensor down_bias = b1.detach().to(at::kFloat), up_bias = b2.detach().to(at::kFloat);
  Tensor gate = like(pool), hidden = floats({pool.size(0), w1.size(0)});
  const Pieces images{pool.size(0), at::divup(pool.size(0), 4)};
  run_tasks(images.count(), [&](int64_t i) {
    const int64_t begin = images.begin(i), size = images.end(i) - begin;
    Tensor rows = hidden.narrow(0, begin, size), gates = gate.narrow(0, begin, size);
    at::addmm_out(rows, down_bias, pool.narrow(0, begin, size), down);
    at::addmm_out(gates, up_bias, at::silu(rows), up);
    gates.sigmoid_();
  });
  return {gate, hidden};
}

// dpool [N, C], BatchNorm's [dbeta, dgamma] over this rank, and the gradients of W1, b1, W2, b2, from the five sums.
inline std::vector<Tensor> gate_backward(
    const Tensor& five, const Tensor& gate, const Tensor& pool, const Tensor& hidden, const Tensor& w1,
    const Tensor& w2, int64_t hw) {
  const int64_t n = pool.size(0), c = pool.size(1), r = hidden.size(1);
  const Tensor down = as_matrix(w1).to(at::kFloat), up = as_matrix(w2).to(at::kFloat);
  Tensor dpool = like(pool), dhidden = like(hidden), dlogit = like(pool);
  const Tensor act = at::silu(hidden);
  const Pieces images{n, at::divup(n, 4)};
  run_tasks(images.count(), [&](int64_t i) {
    const int64_t begin = images.begin(i), size = images.end(i) - begin;
    const auto of = [&](const Tensor& t) { return t.narrow(0, begin, size); };
    Tensor logits = of(dlogit), rows = of(dhidden), pools = of(dpool);
    at::mul_out(logits, of(five[0]), of(gate) * (1 - of(gate)));
    rows.copy_(at::silu_backward(logits.mm(up), of(hidden)));
    at::mm_out(pools, rows, down);
  });
  Tensor bn = floats({2, c}), dw1 = floats({r, c}), dw2 = floats({c, r}), db1 = floats({r}), db2 = floats({c});
  const Pieces spans{c, std::max<int64_t>(at::divup(c, 8), 32)};
  run_tasks(spans.count() + 1, [&](int64_t i) {
    if (i == spans.count()) {
      at::sum_out(db1, dhidden, 0);
      return;
    }
    const int64_t begin = spans.begin(i), size = spans.end(i) - begin;
    const auto of = [&](const Tensor& t) { return t.narrow(-1, begin, size); };
    Tensor columns = of(dw1), rows = dw2.narrow(0, begin, size), sums = of(db2);
    columns.copy_(dhidden.t().mm(of(pool)));
    at::mm_out(rows, of(dlogit).t(), act);
    at::sum_out(sums, of(dlogit), 0);
    const Tensor from_pool = of(dpool) / static_cast<double>(hw);
    for (int64_t j = 0; j < 2; ++j) {
      of(bn[j]).copy_((of(gate) * of(five[1 + j]) + from_pool * of(five[3 + j])).sum(0));
    }
  });
  return {dpool, bn, dw1, db1, dw2, db2};
}

}  // namespace effnet
