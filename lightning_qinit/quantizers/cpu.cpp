// The passes of a quantizer on a CPU, each a single loop over the values. cpu.py defines before: IN and OUT, the types
// of values and results, and DRIFT, which is relative.MAX_DRIFT. The results are those of chain.py to the last bit, but
// for sums, which are over blocks first, in the same order every time.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")  // torch's flags switch it off, and `omp simd` with it
#endif

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C"
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using In = IN;
using Out = OUT;

constexpr int64_t BLOCK = 2048;        // values of which all that is computed stays in the nearest cache
constexpr int64_t LEAST = 16 * BLOCK;  // values for which a second thread pays
constexpr int FEW = 32;                // levels up to which comparing with each is faster than a search among them

// How values lie in memory: in `channels` rows, `outer` times over.
struct Values {
  int64_t outer, channels, inner;
  int threads;

  int64_t blocks_of_a_row() const { return (inner + BLOCK - 1) / BLOCK; }
  int64_t blocks() const { return outer * channels * blocks_of_a_row(); }

  // Calls `work(channel, first value, number of values, index)` for every block.
  template <typename Work>
  void for_each_block(const Work& work) const {
    const int64_t all = blocks(), of_a_row = blocks_of_a_row();
#pragma omp parallel for num_threads(threads) if (outer * channels * inner >= LEAST)
    for (int64_t index = 0; index < all; index++) {
      const int64_t row = index / of_a_row, first = index % of_a_row * BLOCK;
      work(row % channels, row * inner + first, std::min(BLOCK, inner - first), index);
    }
  }

  // The sum over the blocks of a channel.
  float total(const std::vector<float>& sums, int64_t channel) const {
    const int64_t of_a_row = blocks_of_a_row();
    double total = 0;
    for (int64_t row = channel; row < outer * channels; row += channels)
      for (int64_t k = 0; k < of_a_row; k++) total += sums[row * of_a_row + k];
    return static_cast<float>(total);
  }
};

// A parameter within its bounds, and its gradient given that to what it stands for (relative.py).
float within(float value, float low, float high, float otherwise) {
  return value == value ? std::min(std::max(value, low), high) : otherwise;
}

float of_value(float grad, float value, float unit, float low, float high) {
  if (value >= high) grad = grad < 0 ? 0 : grad;
  if (value <= low) grad = grad > 0 ? 0 : grad;
  return grad / unit;
}

// Step and offset by channel, in units if there are any (rounding.Units).
struct Points {
  const float *scale, *unit, *offset, *start;

  float step(int64_t channel) const {
    return unit ? within(scale[channel], 1 / DRIFT, DRIFT, 1) * unit[channel] : scale[channel];
  }

  float shift(int64_t channel) const {
    if (!offset) return 0;
    return unit ? start[channel] + within(offset[channel], -DRIFT, DRIFT, 0) * unit[channel] : offset[channel];
  }

  float to_scale(float grad, int64_t channel) const {
    return unit ? of_value(grad, scale[channel], unit[channel], 1 / DRIFT, DRIFT) : grad;
  }

  float to_offset(float grad, int64_t channel) const {
    return unit ? of_value(grad, offset[channel], unit[channel], -DRIFT, DRIFT) : grad;
  }
};

// The levels at step 1; the lowest and the highest of them if they are uniform.
struct Levels {
  const float* points;
  const int count;
  int depth = 0;                  // steps of a search among them
  std::vector<float> thresholds;  // from which on a normalized value belongs to a level

  Levels(const float* points, int count, bool uniform) : points(points), count(count) {
    if (uniform) return;
    while ((1 << depth) < count) depth++;
    thresholds.resize(int64_t(1) << depth, std::numeric_limits<float>::quiet_NaN());  // which no value reaches
    for (int k = 1; k < count; k++) thresholds[k] = (points[k] + points[k - 1]) / 2;
  }

  float low() const { return points[0]; }
  float high() const { return points[count - 1]; }

  // The level nearest to each normalized value, the upper one of two; NaN stays NaN.
  void nearest(float* __restrict level, const float* __restrict v, int64_t size) const {
    if (!depth) {
      const float low = this->low(), high = this->high();
#pragma omp simd
      for (int64_t i = 0; i < size; i++) {
        const float above = v[i] < low ? low : v[i];
        level[i] = std::rint(above > high ? high : above);
      }
    } else if (count <= FEW) {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) level[i] = v[i] == v[i] ? points[0] : v[i];
      for (int k = 1; k < count; k++) {
        const float threshold = thresholds[k], point = points[k];
#pragma omp simd
        for (int64_t i = 0; i < size; i++) level[i] = v[i] >= threshold ? point : level[i];
      }
    } else {
      int32_t place[BLOCK] = {};
      const float* from = thresholds.data();
      for (int32_t half = 1 << (depth - 1); half; half /= 2) {
#pragma omp simd
        for (int64_t i = 0; i < size; i++) place[i] += v[i] >= from[place[i] + half] ? half : 0;
      }
#pragma omp simd
      for (int64_t i = 0; i < size; i++) level[i] = v[i] == v[i] ? points[place[i]] : v[i];
    }
  }
};

// A block of values in units of the step, from the offset, with the level nearest to each.
struct Block {
  float v[BLOCK], level[BLOCK];

  Block(const In* x, int64_t size, float step, float shift, const Levels& levels) {
    const float inverse = 1 / step;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) v[i] = (static_cast<float>(x[i]) - shift) * inverse;
    levels.nearest(level, v, size);
  }

  void write(Out* out, int64_t size, float step, float shift) const {
    const float* level = this->level;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) out[i] = static_cast<Out>(level[i] * step + shift);
  }
};

}  // namespace

#define PARAMETERS                                                                                                   \
  const In *x, const float *scale, const float *unit, const float *offset, const float *start,                       \
      const float *all_levels, int64_t outer, int64_t channels, int64_t inner, int threads, int count, bool uniform
#define READ_PARAMETERS                                 \
  const Values values{outer, channels, inner, threads}; \
  const Points points{scale, unit, offset, start};      \
  const Levels levels(all_levels, count, uniform)

EXPORTED void forward(Out* out, PARAMETERS) {
  READ_PARAMETERS;
  values.for_each_block([&](int64_t channel, int64_t first, int64_t size, int64_t) {
    const float step = points.step(channel), shift = points.shift(channel);
    const Block block(x + first, size, step, shift, levels);
    block.write(out + first, size, step, shift);
  });
}

// `to_x` may be `grad` itself; `out`, if there is one, receives what `forward` gives.
EXPORTED void backward(In* to_x, const Out* grad, float* to_scale, float* to_offset, Out* out, PARAMETERS,
                       bool learns_rounding, float factor) {
  READ_PARAMETERS;
  std::vector<float> by_scale(values.blocks()), by_offset(values.blocks());
  values.for_each_block([&](int64_t channel, int64_t first, int64_t size, int64_t index) {
    const float step = points.step(channel), shift = points.shift(channel);
    const Block block(x + first, size, step, shift, levels);
    if (out) block.write(out + first, size, step, shift);
    const float *v = block.v, *level = block.level, low = levels.low(), high = levels.high(), learns = learns_rounding;
    const Out* from = grad + first;
    In* to = to_x + first;
    float of_scale = 0, of_offset = 0;
#pragma omp simd reduction(+ : of_scale, of_offset)
    for (int64_t i = 0; i < size; i++) {
      const float g = static_cast<float>(from[i]), between = learns * (level[i] - v[i]);
      const bool inside = (v[i] > low) & (v[i] < high);
      of_scale += g * (inside ? between : level[i]);
      of_offset += inside ? 0.0f : g;
      to[i] = static_cast<In>(inside ? g : 0.0f);
    }
    by_scale[index] = of_scale;
    by_offset[index] = of_offset;
  });
  for (int64_t channel = 0; channel < channels; channel++) {
    to_scale[channel] = points.to_scale(values.total(by_scale, channel) * factor, channel);
    if (offset) to_offset[channel] = points.to_offset(values.total(by_offset, channel) * factor, channel);
  }
}

EXPORTED void tangents(Out* by_scale, Out* by_offset, PARAMETERS, bool learns_rounding) {
  READ_PARAMETERS;
  values.for_each_block([&](int64_t channel, int64_t first, int64_t size, int64_t) {
    const Block block(x + first, size, points.step(channel), points.shift(channel), levels);
    const float *v = block.v, *level = block.level, low = levels.low(), high = levels.high(), learns = learns_rounding;
    Out* to = by_scale + first;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      const float between = learns * (level[i] - v[i]);
      to[i] = static_cast<Out>((v[i] > low) & (v[i] < high) ? between : level[i]);
    }
    if (!offset) return;
    to = by_offset + first;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) to[i] = static_cast<Out>((v[i] > low) & (v[i] < high) ? 0.0f : 1.0f);
  });
}
