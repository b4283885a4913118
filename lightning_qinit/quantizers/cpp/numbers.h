// The numbers that values and results are. Unlike the classes that torch has for those of half a float's width, these
// are converted by whole vectors in a loop.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")  // torch's flags switch it off, and `omp simd` with it
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

enum class BFloat16 : uint16_t {};
enum class Half : uint16_t {};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float wide(float value) { return value; }

float wide(BFloat16 value) { return of_bits(static_cast<uint32_t>(value) << 16); }

float wide(Half value) {
  const uint32_t bits = static_cast<uint32_t>(value), sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  const uint32_t finite = bits_of(of_bits(rest) * 0x1p112f);  // a float's exponents begin lower, by 112
  return of_bits(sign | (rest < 0x0f800000 ? finite : rest | 0x7f800000));
}

// The nearest number, the even one of two.
template <typename To>
To narrow(float value);

template <>
inline float narrow(float value) {
  return value;
}

template <>
inline BFloat16 narrow(float value) {
  const uint32_t bits = bits_of(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
  return static_cast<BFloat16>(static_cast<uint16_t>(value == value ? rounded >> 16 : 0x7fc0));
}

template <>
inline Half narrow(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  const uint32_t normal = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  const float below = std::min(1.0f, of_bits(rest));
  const uint32_t small = static_cast<uint32_t>(static_cast<int32_t>(std::rint(below * 0x1p24f)));
  const uint32_t finite = rest < 0x38800000 ? small : rest < 0x47800000 ? normal : 0x7c00;
  return static_cast<Half>(static_cast<uint16_t>(sign | (value == value ? finite : 0x7e00)));
}

using In = IN;
using Out = OUT;

}  // namespace
