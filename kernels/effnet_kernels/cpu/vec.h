// Float vectors for every storage type; the sigmoid; parallel tasks whose results do not depend on the thread count.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace effnet {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int LANES = Vec::size();

inline Vec load(const float* p) {
  return Vec::loadu(p);
}
inline Vec load(const float* p, int n) {
  return Vec::loadu(p, n);
}
inline Vec load(const BFloat16* p) {
  Vec v;
  at::vec::load_fp32_from_bf16(p, v);
  return v;
}
inline Vec load(const BFloat16* p, int n) {
  BFloat16 padded[LANES] = {};
  std::memcpy(padded, p, n * sizeof(BFloat16));
  return load(padded);
}
inline void store(float* p, Vec v, int n = LANES) {
  v.store(p, n);
}
inline void store(BFloat16* p, Vec v, int n = LANES) {
  at::vec::convert_float_bfloat16(v, v).store(p, n);
}
// The value rounded to the storage type.
template <class T>
inline Vec rounded(Vec v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    T stored[LANES];
    store(stored, v);
    return load(stored);
  }
}

inline Vec fma(Vec a, Vec b, Vec c) {
  return at::vec::fmadd(a, b, c);
}

// The vector instructions of `sigmoid` that AVX-512 and AVX2 spell differently.
#if defined(CPU_CAPABILITY_AVX512)
struct Simd {
  using V = __m512;
  static V set(float x) { return _mm512_set1_ps(x); }
  static V clamp(V x, V low, V high) { return _mm512_max_ps(low, _mm512_min_ps(high, x)); }
  static V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V negative_fma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
  static V times_power_of_two(V x, V whole) { return _mm512_scalef_ps(x, whole); }
  static V reciprocal(V x) { return _mm512_rcp14_ps(x); }  // 14 bits
};
#elif defined(CPU_CAPABILITY_AVX2)
struct Simd {
  using V = __m256;
  static V set(float x) { return _mm256_set1_ps(x); }
  static V clamp(V x, V low, V high) { return _mm256_max_ps(low, _mm256_min_ps(high, x)); }
  static V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V negative_fma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
  static V times_power_of_two(V x, V whole) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
  }
  static V reciprocal(V x) { return _mm256_rcp_ps(x); }  // 12 bits
};
#endif

// 1 / (1 + exp(-x)), within a few units in the last place; NaN stays NaN.
inline Vec sigmoid(Vec x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  // 2^t = 2^round(t) 2^f with |f| <= 1/2, the second factor by Cephes' polynomial (exp2f).
  const auto t = Simd::clamp((x * Vec(-1.44269504088896341f)), Simd::set(-126.f), Simd::set(126.f));
  const auto whole = Simd::round(t), f = t - whole;
  auto p = Simd::set(1.535336188319500e-4f);
  for (const float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                        6.931472028550421e-1f, 1.f}) {
    p = Simd::fma(p, f, Simd::set(c));
  }
  const auto d = Simd::times_power_of_two(p, whole) + Simd::set(1.f);
  const auto r = Simd::reciprocal(d);  // a step of Newton's method doubles its bits
  return Simd::negative_fma(d, r, Simd::set(2.f)) * r;
#else
  return Vec(1.f) / (Vec(1.f) + x.neg().exp());
#endif
}

// Derivative of Swish at z, given s = sigmoid(z): s (1 + z (1 - s)).
inline Vec silu_slope(Vec z, Vec s) {
  return s * fma(z, Vec(1.f) - s, Vec(1.f));
}

// Up to U vectors of channels from channel `c`; where not FULL, one vector of `n` channels.
template <int U_, bool FULL>
struct Block {
  static constexpr int U = U_;
  int64_t c;
  int n = LANES;

  template <class T>
  Vec load(const T* row, int u) const {
    if constexpr (FULL) {
      return effnet::load(row + c + u * LANES);
    } else {
      return effnet::load(row + c, n);
    }
  }
  template <class T>
  void store(T* row, int u, Vec v) const {
    if constexpr (FULL) {
      effnet::store(row + c + u * LANES, v);
    } else {
      effnet::store(row + c, v, n);
    }
  }
};

// Calls f(block) for all channels from `begin` to `end`: U vectors at a time, then single ones, then the rest, masked.
template <int U, class F>
inline void for_blocks(int64_t begin, int64_t end, F&& f) {
  int64_t c = begin;
  for (; c + U * LANES <= end; c += U * LANES) f(Block<U, true>{c});
  if constexpr (U > 1) {
    for (; c + LANES <= end; c += LANES) f(Block<1, true>{c});
  }
  if (c < end) f(Block<1, false>{c, static_cast<int>(end - c)});
}

// Declared by MKL, if PyTorch uses it. MKL splits a product by the process's thread count even inside a task, which
// would change the bits.
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));

struct OneThread {
  int before = 0;
  OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) before = MKL_Set_Num_Threads_Local(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before);
  }
};

// Calls f(0) ... f(count - 1), each on one thread. Products inside a task run on that thread only, so their bits do not
// depend on the thread count. A single task gets a second, empty one for the same reason.
template <class F>
inline void run_tasks(int64_t count, F&& f) {
  at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    // The other threads do not inherit the caller's autocast, so it must not change a task's products.
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    OneThread products;
    for (int64_t i = begin; i < std::min(end, count); ++i) f(i);
  });
}

// A buffer of this thread, aligned to a cache line and reused by later calls; `SLOT` distinguishes two in use at once.
template <int SLOT>
inline float* scratch(int64_t floats) {
  constexpr size_t LINE = 64;
  static thread_local std::vector<float> buffer;
  const size_t needed = floats + LINE / sizeof(float);  // the aligned start is less than a line behind the vector's
  if (buffer.size() < needed) buffer.resize(needed);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return reinterpret_cast<float*>((address + LINE - 1) / LINE * LINE);
}

// Ask for huge pages where a tensor is large: glibc maps more than 32 MiB anew at each allocation, and without them
// the page faults take as long as the pass that writes it.
inline Tensor huge(Tensor x) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const auto first = (begin + PAGE - 1) / PAGE * PAGE, last = (begin + x.nbytes()) / PAGE * PAGE;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

inline Tensor floats(at::IntArrayRef shape) {
  return huge(at::empty(shape, at::TensorOptions().dtype(at::kFloat)));
}

inline Tensor like(const Tensor& x) {
  return huge(at::empty_like(x));
}

// An uninitialised channels-last map of the type of x.
inline Tensor map_like(const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  return huge(at::empty({n, c, h, w}, x.options().memory_format(at::MemoryFormat::ChannelsLast)));
}

// A matrix of `rows` x `columns` at p, rows `stride` apart.
inline Tensor matrix(const float* p, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(const_cast<float*>(p), {rows, columns}, {stride, 1}, at::TensorOptions().dtype(at::kFloat));
}

// [G, ...] summed over G, in order.
inline Tensor ordered_sum(const Tensor& parts) {
  auto shape = parts.sizes().vec();
  const int64_t groups = shape[0], size = parts.numel() / std::max<int64_t>(groups, 1);
  shape.erase(shape.begin());
  Tensor out = floats(shape);
  const float* from = parts.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  constexpr int64_t SPAN = 2048;
  run_tasks(at::divup(size, SPAN), [&](int64_t task) {
    const int64_t begin = task * SPAN, end = std::min(begin + SPAN, size);
    std::copy(from + begin, from + end, to + begin);
    for (int64_t g = 1; g < groups; ++g) {
      for_blocks<4>(begin, end, [&](auto block) {
        for (int u = 0; u < block.U; ++u) block.store(to, u, block.load(to, u) + block.load(from + g * size, u));
      });
    }
  });
  return out;
}

// Calls f with a null pointer of the storage type of x.
template <class F>
inline auto by_type(const Tensor& x, F&& f) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "float32 or bfloat16, not ", x.dtype());
  return x.scalar_type() == at::kFloat ? f(static_cast<float*>(nullptr)) : f(static_cast<BFloat16*>(nullptr));
}

template <class T>
inline T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// N, H * W and C of a channels-last map; rows are its pixels.
struct Map {
  int64_t n, hw, c;
  explicit Map(const Tensor& x) : n(x.size(0)), hw(x.size(2) * x.size(3)), c(x.size(1)) {
    TORCH_CHECK(x.is_contiguous(at::MemoryFormat::ChannelsLast), "expected a channels-last map");
  }
  int64_t rows() const {
    return n * hw;
  }
};

// Consecutive pieces of `total`.
struct Pieces {
  int64_t total, size;
  int64_t count() const {
    return at::divup(total, size);
  }
  int64_t begin(int64_t i) const {
    return i * size;
  }
  int64_t end(int64_t i) const {
    return std::min((i + 1) * size, total);
  }
};

// Rows of [rows, c] that fit in the L2 cache; at least eight tiles if there are enough rows.
inline Pieces row_tiles(int64_t rows, int64_t c) {
  const int64_t fits = std::clamp<int64_t>(131072 / c / 32 * 32, 128, 512);
  return {rows, std::min(fits, std::max<int64_t>(at::divup(rows, 8), 32))};
}

}  // namespace effnet
