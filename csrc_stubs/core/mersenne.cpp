#include "mersenne.h"

#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace trn::mersenne {

namespace {

constexpr int kMiddle = 397;
constexpr int kDegree = 19937;
constexpr int kLimbs = kDegree / 64 + 1;  // of a polynomial of degree kDegree, one bit for each coefficient
using Bits = std::vector<uint64_t>;

bool bit(const Bits& bits, int index) { return (bits[static_cast<size_t>(index) / 64] >> (index % 64) & 1) != 0; }

// to ^= from * x^shift.
void add_shifted(Bits& to, const Bits& from, int shift) {
  const size_t words = static_cast<size_t>(shift) / 64;
  const int bits = shift % 64;
  const size_t count = std::min(from.size(), to.size() - words);
  if (bits == 0) {
    for (size_t i = 0; i < count; ++i) to[i + words] ^= from[i];
    return;
  }
  uint64_t carry = 0;
  for (size_t i = 0; i < count; ++i) {
    to[i + words] ^= from[i] << bits | carry;
    carry = from[i] >> (64 - bits);
  }
  if (count + words < to.size()) to[count + words] ^= carry;
}

// The sequence of words that a state begins, `count` of them.
std::vector<uint32_t> words_of(const std::array<uint32_t, kWords>& state, size_t count) {
  std::vector<uint32_t> words(state.begin(), state.end());
  words.resize(count);
  for (size_t i = kWords; i < count; ++i) {
    const uint32_t mixed = (words[i - kWords] & 0x80000000u) | (words[i - kWords + 1] & 0x7fffffffu);
    words[i] = words[i - kWords + kMiddle] ^ mixed >> 1 ^ ((mixed & 1) != 0 ? 0x9908b0dfu : 0u);
  }
  return words;
}

// The shortest linear recurrence of a sequence of bits, by Berlekamp and Massey's algorithm. The polynomial is
// irreducible, so any sequence of the generator's bits has it.
Bits find_characteristic() {
  std::array<uint32_t, kWords> state{};
  for (int i = 0; i < kWords; ++i) state[static_cast<size_t>(i)] = 1812433253u * static_cast<uint32_t>(i + 1);
  const std::vector<uint32_t> words = words_of(state, kWords + 2 * kDegree + 1);
  Bits current(kLimbs), previous(kLimbs), past(kLimbs);  // bit i of `past` is the term i before the newest
  current[0] = previous[0] = 1;
  int length = 0, since = 1;
  for (int n = 0; n < 2 * kDegree; ++n) {
    uint64_t carry = words[static_cast<size_t>(n) + kWords] & 1;
    uint64_t parity = 0;
    for (int i = 0; i < kLimbs; ++i) {
      uint64_t& limb = past[static_cast<size_t>(i)];
      const uint64_t next = limb >> 63;
      limb = limb << 1 | carry;
      carry = next;
      parity ^= limb & current[static_cast<size_t>(i)];
    }
    if ((__builtin_popcountll(parity) & 1) == 0) {
      since += 1;
      continue;
    }
    const Bits before = current;
    add_shifted(current, previous, since);
    if (2 * length > n) {
      since += 1;
      continue;
    }
    length = n + 1 - length;
    previous = before;
    since = 1;
  }
  Bits reversed(kLimbs);
  for (int i = 0; i <= kDegree; ++i) {
    if (bit(current, kDegree - i)) reversed[static_cast<size_t>(i) / 64] |= uint64_t{1} << (i % 64);
  }
  return reversed;
}

uint64_t spread(uint32_t half) {
  uint64_t x = half;
  x = (x | x << 16) & 0x0000ffff0000ffffull;
  x = (x | x << 8) & 0x00ff00ff00ff00ffull;
  x = (x | x << 4) & 0x0f0f0f0f0f0f0f0full;
  x = (x | x << 2) & 0x3333333333333333ull;
  return (x | x << 1) & 0x5555555555555555ull;
}

void reduce(Bits& value, const Bits& phi) {
  for (int i = static_cast<int>(value.size()) * 64 - 1; i >= kDegree; --i) {
    if (bit(value, i)) add_shifted(value, phi, i - kDegree);
  }
  value.resize(kLimbs);
}

// x^exponent mod phi.
Bits power(uint64_t exponent, const Bits& phi) {
  Bits value(kLimbs);
  value[0] = 1;
  for (int i = 63 - __builtin_clzll(exponent); i >= 0; --i) {
    Bits square(2 * kLimbs + 1);
    for (size_t limb = 0; limb < kLimbs; ++limb) {
      square[2 * limb] = spread(static_cast<uint32_t>(value[limb]));
      square[2 * limb + 1] = spread(static_cast<uint32_t>(value[limb] >> 32));
    }
    if ((exponent >> i & 1) != 0) {
      const Bits before = square;
      square.assign(square.size(), 0);
      add_shifted(square, before, 1);
    }
    reduce(square, phi);
    value = std::move(square);
  }
  return value;
}

// Layers of a model draw the same numbers over and over, so the last polynomials are kept.
std::shared_ptr<const Bits> polynomial(uint64_t exponent) {
  constexpr size_t kKept = 256;
  static auto* mutex = new std::mutex;
  static auto* kept = new std::map<uint64_t, std::shared_ptr<const Bits>>;
  std::lock_guard<std::mutex> lock(*mutex);
  static const auto* phi = new Bits(find_characteristic());
  auto found = kept->find(exponent);
  if (found != kept->end()) return found->second;
  if (kept->size() >= kKept) kept->clear();
  return (*kept)[exponent] = std::make_shared<const Bits>(power(exponent, *phi));
}

}  // namespace

// The low 31 bits of the first word are no part of the state, so the recurrence holds from the second word on: one step
// is taken as such.
void jump(std::array<uint32_t, kWords>& state, uint64_t blocks) {
  const std::shared_ptr<const Bits> p = polynomial(blocks * kWords - 1);
  const std::vector<uint32_t> words = words_of(state, kWords + kDegree + 1);
  std::array<uint32_t, kWords> sum{};
  for (int i = 0; i < kDegree; ++i) {
    if (!bit(*p, i)) continue;
    const uint32_t* from = words.data() + 1 + i;
    for (int word = 0; word < kWords; ++word) sum[static_cast<size_t>(word)] ^= from[word];
  }
  state = sum;
}

}  // namespace trn::mersenne
