// The Program as the native side sees it: flat tables instead of a tree of Python objects.
//
// Python encodes each loop and each instruction once; loops are expanded here, because building a
// list of expanded instructions in Python costs microseconds an instruction.
#pragma once

#include <cstdint>
#include <vector>

namespace trn {

constexpr int kEngines = 5;  // TensorE, VectorE, ScalarE, GpSimdE, DMA, in this order.
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

struct Instruction {
  int64_t engine;
  int64_t queue;  // DMA queue, or -1.
  int64_t occupancy_ps;
  int64_t latency_ps;
  int64_t queue_ps;
  int64_t reuse_ps;
  Weights weights;
  int64_t first_ref;  // Its writes, then its reads.
  int64_t num_writes;
  int64_t num_reads;
};

enum class Opcode : int64_t { kStep = 0, kLoop = 1, kEnd = 2 };

// kStep: argument = instruction. kLoop: argument = trips, target = position after its kEnd.
// kEnd: target = position after its kLoop.
struct Op {
  Opcode opcode;
  int64_t argument;
  int64_t target;
};

struct Program {
  std::vector<Pool> pools;
  std::vector<Term> terms;
  std::vector<Ref> refs;
  std::vector<Instruction> instructions;
  std::vector<Op> ops;
  int64_t num_slots = 0;
  int64_t num_queues = 0;
};

}  // namespace trn
