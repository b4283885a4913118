// The passes of a quantizer on a CPU, each a single loop over the values. The results are those of chain.py to the last
// bit, but for sums, which are over blocks first, in the same order every time.

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace {

constexpr int FEW = 32;  // levels up to which comparing with each is faster than a search among them

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

// Values in units of the step, from the offset, with the level nearest to each.
struct Rounded {
  float v[BLOCK], level[BLOCK];
  int64_t size;
  float low, high;

  Rounded(const In* x, int64_t size, float step, float shift, const Levels& levels)
      : size(size), low(levels.low()), high(levels.high()) {
    const float inverse = 1 / step;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) v[i] = (wide(x[i]) - shift) * inverse;
    levels.nearest(level, v, size);
  }

  void write(Out* out, float step, float shift) const {
    const float* level = this->level;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) out[i] = narrow<Out>(level[i] * step + shift);
  }

  // Writes the gradients to the values, given those to the results, and returns what step and offset receive.
  std::pair<float, float> gradients(const Out* grad, In* to, bool learns_rounding) const {
    const float *v = this->v, *level = this->level, low = this->low, high = this->high, learns = learns_rounding;
    float of_scale = 0, of_offset = 0;
#pragma omp simd reduction(+ : of_scale, of_offset)
    for (int64_t i = 0; i < size; i++) {
      const float g = wide(grad[i]), between = learns * (level[i] - v[i]);
      const bool inside = (v[i] > low) & (v[i] < high);
      of_scale += g * (inside ? between : level[i]);
      of_offset += inside ? 0.0f : g;
      to[i] = narrow<In>(inside ? g : 0.0f);
    }
    return {of_scale, of_offset};
  }

  void by_scale(Out* to, bool learns_rounding) const {
    const float *v = this->v, *level = this->level, low = this->low, high = this->high, learns = learns_rounding;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      const float between = learns * (level[i] - v[i]);
      to[i] = narrow<Out>((v[i] > low) & (v[i] < high) ? between : level[i]);
    }
  }

  void by_offset(Out* to) const {
    const float *v = this->v, low = this->low, high = this->high;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) to[i] = narrow<Out>((v[i] > low) & (v[i] < high) ? 0.0f : 1.0f);
  }
};

}  // namespace

#define PARAMETERS                                                                                                   \
  const In *x, const float *scale, const float *unit, const float *offset, const float *start,                       \
      const float *all_levels, int64_t outer, int64_t channels, int64_t inner, int64_t rows, int64_t length,         \
      int threads, int count, bool uniform
#define READ_PARAMETERS                                               \
  const Values values{outer, channels, inner, rows, length, threads}; \
  const Points points{scale, unit, offset, start};                    \
  const Levels levels(all_levels, count, uniform)

EXPORTED void forward(Out* out, PARAMETERS) {
  READ_PARAMETERS;
  values.for_each_block([&](const Block& block) {
    const float step = points.step(block.channel), shift = points.shift(block.channel);
    Block::Room room;
    block.for_each_line([&](int64_t first, int64_t place, int64_t size) {
      Rounded(x + first, size, step, shift, levels).write(rows ? room + place : out + first, step, shift);
    });
    if (rows) block.write_across(out, room);
  });
}

// `to_x` may be `grad` itself if that does not lie across; `out`, if there is one, receives what `forward` gives.
EXPORTED void backward(const Out* grad, In* to_x, float* to_scale, float* to_offset, Out* out, PARAMETERS,
                       bool learns_rounding, float factor) {
  READ_PARAMETERS;
  std::vector<float> by_scale(values.blocks()), by_offset(values.blocks());
  values.for_each_block([&](const Block& block) {
    const float step = points.step(block.channel), shift = points.shift(block.channel);
    Block::Room room;
    if (rows) block.read_across(grad, room);
    block.for_each_line([&](int64_t first, int64_t place, int64_t size) {
      const Rounded rounded(x + first, size, step, shift, levels);
      const auto [of_scale, of_offset] =
          rounded.gradients(rows ? room + place : grad + first, to_x + first, learns_rounding);
      by_scale[block.index] += of_scale;
      by_offset[block.index] += of_offset;
      if (out) rounded.write(rows ? room + place : out + first, step, shift);
    });
    if (rows && out) block.write_across(out, room);
  });
  for (int64_t channel = 0; channel < channels; channel++) {
    to_scale[channel] = points.to_scale(values.total(by_scale, channel) * factor, channel);
    if (offset) to_offset[channel] = points.to_offset(values.total(by_offset, channel) * factor, channel);
  }
}

EXPORTED void tangents(Out* by_scale, Out* by_offset, PARAMETERS, bool learns_rounding) {
  READ_PARAMETERS;
  values.for_each_block([&](const Block& block) {
    const float step = points.step(block.channel), shift = points.shift(block.channel);
    Block::Room room, room_of_offset;
    block.for_each_line([&](int64_t first, int64_t place, int64_t size) {
      const Rounded rounded(x + first, size, step, shift, levels);
      rounded.by_scale(rows ? room + place : by_scale + first, learns_rounding);
      if (offset) rounded.by_offset(rows ? room_of_offset + place : by_offset + first);
    });
    if (rows) block.write_across(by_scale, room);
    if (rows && offset) block.write_across(by_offset, room_of_offset);
  });
}

// Lays `images` of `rows` by `length` values across.
EXPORTED void across(In* out, const In* x, int64_t images, int64_t rows, int64_t length, int threads) {
  const Values values{1, 1, images * rows * length, rows, length, threads};
  values.for_each_block([&](const Block& block) {
    block.for_each_square([&](int64_t row, int64_t k, int64_t some_rows, int64_t some) {
      const In* from = x + block.first + row * length + k;
      In* to = out + block.first_across + k * rows + row;
      if (some_rows < SIDE || some < SIDE)
        lay_across(from, length, some_rows, some, to, rows);
      else
        lay_square_across(from, length, SIDE, to, rows, SIDE);
    });
  });
}
