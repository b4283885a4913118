// How values lie in memory, and the blocks of them that are worked on.
//
// What is on the other side of a rounding, its result and the gradient to that, may lie across: of images (rows, length),
// it lies as (length, rows). The channels are last then, as convolutions are fastest.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BLOCK = 2048;        // values of which all that is computed stays in the nearest cache
constexpr int64_t LEAST = 16 * BLOCK;  // values for which a second thread pays
constexpr int64_t SIDE = 16;           // of the squares in which values are laid across: a vector of many a machine
constexpr int64_t ROOM = 8192;         // values laid across at once, if so many make SIDE rows of
constexpr int64_t WIDE = BLOCK;        // values, at most

// Lays `rows` of `columns` values across.
template <typename T>
void lay_across(const T* from, int64_t pitch, int64_t rows, int64_t columns, T* to, int64_t to_pitch) {
  for (int64_t k = 0; k < columns; k++)
    for (int64_t i = 0; i < rows; i++) to[k * to_pitch + i] = from[i * pitch + k];
}

// The same of a square: of `rows` rows it reads, and of `to_rows` it writes, all SIDE values.
template <typename T>
void lay_square_across(const T* from, int64_t pitch, int64_t rows, T* to, int64_t to_pitch, int64_t to_rows) {
  T square[SIDE * SIDE], across[SIDE * SIDE];
  if (rows < SIDE) std::fill(square, square + SIDE * SIDE, T{});
  for (int64_t i = 0; i < rows; i++)
#pragma omp simd
    for (int64_t k = 0; k < SIDE; k++) square[i * SIDE + k] = from[i * pitch + k];
  for (int64_t k = 0; k < SIDE; k++)
#pragma GCC unroll 16
    for (int64_t i = 0; i < SIDE; i++) across[k * SIDE + i] = square[i * SIDE + k];
  for (int64_t i = 0; i < to_rows; i++)
#pragma omp simd
    for (int64_t k = 0; k < SIDE; k++) to[i * to_pitch + k] = across[i * SIDE + k];
}

// What is worked on at once: values in a row; or, where results lie across, those of `rows` rows `length` each.
struct Block {
  int64_t channel, index, first, rows, length, pitch, first_across, pitch_across;

  using Room = Out[std::max(ROOM, SIDE * WIDE) + SIDE];

  // Calls `work(first value, its place in a room, number of values)` for lines of values, as they lie.
  template <typename Work>
  void for_each_line(const Work& work) const {
    if (length < pitch)
      for (int64_t row = 0; row < rows; row++) work(first + row * pitch, row * length, length);
    else
      for (int64_t place = 0; place < rows * length; place += BLOCK)
        work(first + place, place, std::min(BLOCK, rows * length - place));
  }

  void read_across(const Out* y, Out* room) const {
    for_each_square([&](int64_t row, int64_t k, int64_t some_rows, int64_t some) {
      const Out* from = y + first_across + k * pitch_across + row;
      if (some_rows < SIDE)
        lay_across(from, pitch_across, some, some_rows, room + row * length + k, length);
      else
        lay_square_across(from, pitch_across, some, room + row * length + k, length, SIDE);
    });
  }

  void write_across(Out* y, const Out* room) const {
    for_each_square([&](int64_t row, int64_t k, int64_t some_rows, int64_t some) {
      Out* to = y + first_across + k * pitch_across + row;
      if (some_rows < SIDE)
        lay_across(room + row * length + k, length, some_rows, some, to, pitch_across);
      else
        lay_square_across(room + row * length + k, length, SIDE, to, pitch_across, some);
    });
  }

  // Goes along the results, whose rows are the columns here. Columns are taken from the last to the first: what is read and
  // written beyond the end of a row is no value of the block, and is written anew with the next row's first columns.
  template <typename Work>
  void for_each_square(const Work& work) const {
    for (int64_t k = (length - 1) / SIDE * SIDE; k >= 0; k -= SIDE)
      for (int64_t row = 0; row < rows; row += SIDE)
        work(row, k, std::min(SIDE, rows - row), std::min(SIDE, length - k));
  }
};

// How values lie in memory: in `channels` rows of `inner` values, `outer` times over. Where results lie across, these
// are images of `rows` by `length`; else `rows` is 0.
struct Values {
  int64_t outer, channels, inner, rows, length;
  int threads;

  // Images are cut into rectangles.
  int64_t across() const { return (length + WIDE - 1) / WIDE; }
  int64_t width() const { return length <= WIDE ? length : (length + across() * SIDE - 1) / (across() * SIDE) * SIDE; }
  int64_t height() const { return std::max(SIDE, ROOM / width() / SIDE * SIDE); }
  int64_t down() const { return (rows + height() - 1) / height(); }

  int64_t blocks_of_a_row() const {
    return rows ? inner / (rows * length) * across() * down() : (inner + BLOCK - 1) / BLOCK;
  }
  int64_t blocks() const { return outer * channels * blocks_of_a_row(); }

  // Calls `work` for every block.
  template <typename Work>
  void for_each_block(const Work& work) const {
    const int64_t all = blocks(), of_a_row = blocks_of_a_row();
#pragma omp parallel for num_threads(threads) if (outer * channels * inner >= LEAST)
    for (int64_t index = 0; index < all; index++) {
      const int64_t row = index / of_a_row, place = index % of_a_row;
      work(rows ? rectangle(row, place, index) : line(row, place, index));
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

 private:
  Block line(int64_t row, int64_t place, int64_t index) const {
    const int64_t first = place * BLOCK, size = std::min(BLOCK, inner - first);
    return {row % channels, index, row * inner + first, 1, size, size, 0, 0};
  }

  Block rectangle(int64_t row, int64_t place, int64_t index) const {
    const int64_t image = row * inner + place / (across() * down()) * rows * length;
    const int64_t top = place % down() * height(), left = place / down() % across() * width();
    const int64_t some_rows = std::min(height(), rows - top), some = std::min(width(), length - left);
    const int64_t first = image + top * length + left, first_across = image + left * rows + top;
    return {row % channels, index, first, some_rows, some, length, first_across, rows};
  }
};

}  // namespace
