// Values of the PE array.
#pragma once

#include <cstdint>

namespace trn {

// total [m, n] = stationary [k, m] transposed x moving [k, n], row-major. As in the array, the sum of each result runs
// down its column from partition 0 on, in fp32, product and sum rounded apart.
void TileMatmul(const float* stationary, const float* moving, float* total, int64_t k, int64_t m, int64_t n);

}  // namespace trn
