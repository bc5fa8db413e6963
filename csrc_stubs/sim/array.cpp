#include "array.h"

#include <algorithm>

namespace trn {

namespace {

constexpr int64_t kRows = 4;    // Results that share each moving row that is read.
constexpr int64_t kWide = 128;  // Columns whose moving rows stay in the first cache.

// The same sums in the same order on every machine: clones differ in how many columns they take at once.
#if defined(__x86_64__)
__attribute__((target_clones("avx2", "default")))
#endif
void Block(const float* stationary, const float* moving, float* total, int64_t k, int64_t m, int64_t n, int64_t rows,
           int64_t first, int64_t width) {
  float sums[kRows][kWide] = {};
  for (int64_t p = 0; p < k; ++p) {
    const float* row = moving + p * n + first;
    for (int64_t i = 0; i < rows; ++i) {
      const float weight = stationary[p * m + i];
      for (int64_t j = 0; j < width; ++j) {
        const float product = weight * row[j];
        sums[i][j] += product;
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::copy(sums[i], sums[i] + width, total + i * n + first);
  }
}

}  // namespace

void TileMatmul(const float* stationary, const float* moving, float* total, int64_t k, int64_t m, int64_t n) {
  for (int64_t first = 0; first < n; first += kWide) {
    const int64_t width = std::min(kWide, n - first);
    for (int64_t row = 0; row < m; row += kRows) {
      Block(stationary + row, moving, total + row * n, k, m, n, std::min(kRows, m - row), first, width);
    }
  }
}

}  // namespace trn
