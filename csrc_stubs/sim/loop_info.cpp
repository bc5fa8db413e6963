#include "loop_info.h"

#include <algorithm>
#include <numeric>

namespace trn {
namespace {

int64_t Modulo(int64_t value, int64_t by) {
  const int64_t rest = value % by;
  return rest < 0 ? rest + by : rest;
}

// The coefficients of one loop's counter in the indices of the instructions in it, by pool.
std::vector<std::vector<int64_t>> Coefficients(const Program& program, const LoopInfo& info, int64_t depth) {
  std::vector<std::vector<int64_t>> by_pool(program.pools.size());
  for (int64_t i = info.first_instruction; i < info.end_instruction; ++i) {
    const Instruction& what = program.instructions[i];
    for (int64_t r = what.first_ref; r < what.first_ref + what.num_writes + what.num_reads; ++r) {
      const Ref& ref = program.refs[r];
      int64_t coefficient = 0;
      for (int64_t t = ref.first_term; t < ref.end_term; ++t) {
        if (program.terms[t].depth == depth) coefficient += program.terms[t].coefficient;
      }
      by_pool[ref.pool].push_back(Modulo(coefficient, program.pools[ref.pool].slots));
    }
  }
  return by_pool;
}

// Makes `period` one after which a pool's slots are where they were, or have all moved on alike:
// parts of HBM may, and tiles if every slot gets its turn. False if the loop is too short for it.
bool Fits(const Pool& pool, const std::vector<int64_t>& coefficients, int64_t trips, int64_t& period) {
  const auto differs = [&](int64_t coefficient) { return coefficient != coefficients.front(); };
  const bool alike = std::none_of(coefficients.begin(), coefficients.end(), differs);
  if (!pool.hbm && alike && !coefficients.empty() && std::gcd(coefficients.front(), pool.slots) == 1) {
    return pool.slots < trips / 2 || pool.slots == 1;
  }
  for (const int64_t coefficient : coefficients) {
    const int64_t moved = pool.hbm ? Modulo(coefficient - coefficients.front(), pool.slots) : coefficient;
    period = std::lcm(period, pool.slots / std::gcd(pool.slots, moved));
    if (period > trips / 3) return false;
  }
  return true;
}

// Instructions that one iteration runs; sets the range of their numbers.
int64_t Count(const Program& program, int64_t position, LoopInfo& info) {
  std::vector<int64_t> counts{0};
  std::vector<int64_t> trips;
  info.first_instruction = -1;
  for (int64_t at = position + 1; at < program.ops[position].target - 1; ++at) {
    const Op& op = program.ops[at];
    if (op.opcode == Opcode::kStep) {
      if (info.first_instruction < 0) info.first_instruction = op.argument;
      info.end_instruction = op.argument + 1;
      ++counts.back();
    } else if (op.opcode == Opcode::kLoop) {
      trips.push_back(op.argument);
      counts.push_back(0);
    } else {
      const int64_t inner = counts.back() * trips.back();
      counts.pop_back();
      trips.pop_back();
      counts.back() += inner;
    }
  }
  return counts.back();
}

void FindActors(const Program& program, LoopInfo& info) {
  std::vector<char> used(program.num_actors(), 0);
  for (int64_t i = info.first_instruction; i < info.end_instruction; ++i) {
    const Instruction& what = program.instructions[i];
    for (int64_t c = what.first_choice; c < what.first_choice + what.num_choices; ++c) {
      const int64_t engine = program.choices[c].engine;
      used[engine == kDma ? kDma + what.queue : engine] = 1;
    }
  }
  for (int64_t actor = 0; actor < program.num_actors(); ++actor) {
    if (used[actor]) info.actors.push_back(actor);
  }
}

}  // namespace

LoopInfo Analyse(const Program& program, int64_t position, int64_t depth, int64_t worthwhile) {
  LoopInfo info;
  const int64_t trips = program.ops[position].argument;
  if (trips < 4 || Count(program, position, info) * trips < worthwhile) return info;
  const auto by_pool = Coefficients(program, info, depth);
  for (size_t p = 0; p < by_pool.size(); ++p) {
    if (!Fits(program.pools[p], by_pool[p], trips, info.period)) return info;
  }
  for (size_t p = 0; p < by_pool.size(); ++p) {
    if (by_pool[p].empty()) continue;
    const int64_t slots = program.pools[p].slots;
    info.pools.push_back({static_cast<int64_t>(p), by_pool[p].front() * (info.period % slots) % slots});
  }
  FindActors(program, info);
  info.watched = true;
  return info;
}

}  // namespace trn
