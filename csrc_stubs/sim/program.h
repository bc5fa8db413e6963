// The Program as the native side sees it: flat tables instead of a tree of Python objects.
//
// Python encodes each loop and each instruction once; loops are expanded here, because building a
// list of expanded instructions in Python costs microseconds an instruction.
#pragma once

#include <cstdint>
#include <vector>

namespace trn {

constexpr int kEngines = 5;  // TensorE, VectorE, ScalarE, GpSimdE, DMA, in this order.
constexpr int kTensor = 0;
constexpr int kDma = 4;
constexpr int kMaxOperands = 12;

// How an instruction treats the weights that are loaded into the PE array.
enum class Weights : int64_t { kUntouched = 0, kReplaced = 1, kReusable = 2 };

struct Pool {
  int64_t slots;
  int64_t first_slot;  // Position of its slot 0 among the slots of all pools.
  bool hbm;
};

struct Term {
  int64_t depth;  // Which open loop's counter, outermost first.
  int64_t coefficient;
};

// Names slot (constant + sum of coefficient x counter) modulo the pool's slots.
struct Ref {
  int64_t pool;
  int64_t constant;
  int64_t first_term;
  int64_t end_term;
};

// One engine that can run an instruction, and what it costs there.
struct Choice {
  int64_t engine;
  int64_t occupancy_ps;
  int64_t latency_ps;
  int64_t queue_ps;       // DMA: how long its own engines need for it without other transfers.
  int64_t reuse_ps;       // TensorE: occupancy where its weights are still loaded.
  int64_t lost_ps;        // Part of occupancy_ps that the power limiter took,
  int64_t reuse_lost_ps;  // and of reuse_ps.
};

struct Instruction {
  int64_t queue;  // DMA queue, or -1.
  Weights weights;
  int64_t first_choice;
  int64_t num_choices;
  int64_t first_ref;  // Its writes, then its reads.
  int64_t num_writes;
  int64_t num_reads;
};

enum class Opcode : int64_t { kStep = 0, kLoop = 1, kEnd = 2 };

// kStep: argument = instruction. kLoop: argument = trips, target = position after its kEnd.
// kEnd: target = position after its kLoop. Instructions are numbered in the order of their steps.
struct Op {
  Opcode opcode;
  int64_t argument;
  int64_t target;
};

struct Program {
  std::vector<Pool> pools;
  std::vector<Term> terms;
  std::vector<Ref> refs;
  std::vector<Choice> choices;
  std::vector<Instruction> instructions;
  std::vector<Op> ops;
  int64_t num_slots = 0;
  int64_t num_queues = 0;

  int64_t num_actors() const { return kDma + num_queues; }
};

// One instruction of the expanded Program. It stands for itself, without the loops it came from, so
// that an issue pass can hold many of these and hand them on in another order.
struct Issued {
  int32_t instruction;
  int32_t choice;               // Position in Program::choices.
  int32_t slots[kMaxOperands];  // Writes, then reads.
};

// An actor is what runs in order: one of the four compute engines, or one DMA queue.
inline int64_t ActorOf(const Program& program, const Issued& issued) {
  const int64_t engine = program.choices[issued.choice].engine;
  return engine == kDma ? kDma + program.instructions[issued.instruction].queue : engine;
}

}  // namespace trn
