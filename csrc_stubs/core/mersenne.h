// Moving a Mersenne Twister (mt19937) on by many draws without drawing them.
//
// A draw is a linear map F of the state over GF(2). With phi its characteristic polynomial, F^n is p(F) for
// p(x) = x^n mod phi(x), so that any number of draws costs what some 20,000 do. Torch-free.
#pragma once

#include <array>
#include <cstdint>

namespace trn::mersenne {

constexpr int kWords = 624;

// The words that follow `blocks` (> 0) times 624 draws after those of `state`.
void jump(std::array<uint32_t, kWords>& state, uint64_t blocks);

}  // namespace trn::mersenne
