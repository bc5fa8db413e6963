// torch_trn._sim: the scheduler for Python. Tables come as int64 buffers, results go as such.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "array.h"
#include "follow.h"
#include "loops.h"
#include "scheduler.h"
#include "window.h"

namespace py = pybind11;

namespace trn {
namespace {

// Rows of a flat table of int64, checked for their width.
class Rows {
 public:
  Rows(const py::buffer& table, int64_t columns, const char* name) : info_(table.request()), columns_(columns) {
    if (info_.itemsize != sizeof(int64_t) || info_.ndim != 1 || info_.size % columns) {
      throw std::invalid_argument(std::string(name) + " must be a flat table of int64 with " + std::to_string(columns) +
                                  " columns");
    }
  }
  int64_t size() const { return info_.size / columns_; }
  const int64_t* operator[](int64_t row) const { return static_cast<const int64_t*>(info_.ptr) + row * columns_; }

 private:
  py::buffer_info info_;
  int64_t columns_;
};

// A loop that nobody watches.
struct Unwatched {
  void Enter(int64_t, int64_t) {}
  int64_t Skip(int64_t, int64_t, int64_t) { return 0; }
};

Instruction DecodeInstruction(const int64_t* row) {
  const Instruction what{row[0], static_cast<Weights>(row[1]), row[2], row[3], row[4], row[5], row[6]};
  if (what.num_writes + what.num_reads > kMaxOperands) {
    throw std::invalid_argument("an instruction has " + std::to_string(what.num_writes + what.num_reads) +
                                " operands; the scheduler takes at most " + std::to_string(kMaxOperands));
  }
  return what;
}

Program Decode(const py::buffer& pools, const py::buffer& terms, const py::buffer& refs, const py::buffer& choices,
               const py::buffer& instructions, const py::buffer& ops) {
  Program program;
  const Rows pool_rows(pools, 2, "pools"), term_rows(terms, 2, "terms"), ref_rows(refs, 4, "refs");
  const Rows choice_rows(choices, 7, "choices"), rows(instructions, 7, "instructions"), op_rows(ops, 3, "ops");
  for (int64_t i = 0; i < pool_rows.size(); ++i) {
    const int64_t slots = pool_rows[i][0];
    program.pools.push_back({slots, program.num_slots, pool_rows[i][1] != 0});
    program.num_slots += slots;
  }
  for (int64_t i = 0; i < term_rows.size(); ++i) {
    program.terms.push_back({term_rows[i][0], term_rows[i][1]});
  }
  for (int64_t i = 0; i < ref_rows.size(); ++i) {
    const int64_t* row = ref_rows[i];
    program.refs.push_back({row[0], row[1], row[2], row[3]});
  }
  for (int64_t i = 0; i < choice_rows.size(); ++i) {
    const int64_t* row = choice_rows[i];
    program.choices.push_back({row[0], row[1], row[2], row[3], row[4], row[5], row[6]});
  }
  for (int64_t i = 0; i < rows.size(); ++i) {
    program.instructions.push_back(DecodeInstruction(rows[i]));
    program.num_queues = std::max(program.num_queues, program.instructions.back().queue + 1);
  }
  for (int64_t i = 0; i < op_rows.size(); ++i) {
    program.ops.push_back({static_cast<Opcode>(op_rows[i][0]), op_rows[i][1], op_rows[i][2]});
  }
  return program;
}

// Expands `program`, fixes its order and times it. look_ahead 0 is program order.
void Run(const Program& program, Scheduler& scheduler, int64_t look_ahead, bool extrapolate) {
  std::optional<Window> window;
  if (look_ahead) window.emplace(program, scheduler, look_ahead);
  const auto in_order = [&](Issued& issued) {
    if (program.instructions[issued.instruction].num_choices > 1) scheduler.Choose(issued);
    scheduler.Schedule(issued);
  };
  const auto reordered = [&](Issued& issued) { window->Add(issued); };
  const auto expand = [&](auto&& loops) {
    if (window) {
      Expander(program).Run(reordered, loops);
    } else {
      Expander(program).Run(in_order, loops);
    }
  };
  if (extrapolate) {
    expand(LoopWatch(program, scheduler, window ? &*window : nullptr));
  } else {
    expand(Unwatched{});
  }
  if (window) window->Drain();
}

py::array_t<int64_t> SpanTable(std::vector<Span> spans) {
  std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.start_ps < b.start_ps; });
  py::array_t<int64_t> table({static_cast<py::ssize_t>(spans.size()), py::ssize_t{7}});
  int64_t* out = table.mutable_data();
  for (const Span& span : spans) {
    *out++ = span.instruction;
    *out++ = span.choice;
    *out++ = span.start_ps;
    *out++ = span.end_ps;
    *out++ = static_cast<int64_t>(span.wait.reason);
    *out++ = span.wait.pool;
    *out++ = span.count;
  }
  return table;
}

py::tuple Schedule(const py::tuple& tables, const std::optional<py::tuple>& issued_for, const py::tuple& constants,
                   int64_t look_ahead, bool spans, bool extrapolate) {
  const auto decode = [](const py::tuple& t) { return Decode(t[0], t[1], t[2], t[3], t[4], t[5]); };
  const auto number = [&](size_t i) { return constants[i].cast<int64_t>(); };
  const Program program = decode(tables);
  const Constants own{number(0), number(1), number(2), {number(3), number(4)}};
  Scheduler scheduler(program, own, spans);
  if (issued_for) {
    const Program other = decode((*issued_for)[0]);
    const py::tuple c = (*issued_for)[1];
    const auto theirs = [&](size_t i) { return c[i].cast<int64_t>(); };
    std::vector<Placement> placements;
    Scheduler first(other, {theirs(0), theirs(1), theirs(2), {theirs(3), theirs(4)}}, false);
    first.placements = &placements;
    const py::gil_scoped_release release;
    Run(other, first, look_ahead, false);
    RunInOrder(program, other, placements, scheduler);
  } else {
    const py::gil_scoped_release release;
    Run(program, scheduler, look_ahead, extrapolate && !spans);
  }
  const State& state = scheduler.state();
  const std::vector<int64_t>& sums = state.totals.sums();
  int64_t duration_ps = 0;
  for (const int64_t done_ps : state.done_ps) duration_ps = std::max(duration_ps, done_ps);
  py::array_t<int64_t> sum_table(static_cast<py::ssize_t>(sums.size()), sums.data());
  return py::make_tuple(duration_ps, sum_table, scheduler.num_run(), SpanTable(scheduler.spans()));
}

using Matrix = py::array_t<float, py::array::c_style | py::array::forcecast>;

Matrix Multiply(const Matrix& stationary, const Matrix& moving) {
  if (stationary.ndim() != 2 || moving.ndim() != 2 || stationary.shape(0) != moving.shape(0)) {
    throw std::invalid_argument("stationary [k, m] and moving [k, n] must be matrices with the same k");
  }
  const int64_t k = stationary.shape(0), m = stationary.shape(1), n = moving.shape(1);
  Matrix total({m, n});
  {
    py::gil_scoped_release release;
    TileMatmul(stationary.data(), moving.data(), total.mutable_data(), k, m, n);
  }
  return total;
}

}  // namespace
}  // namespace trn

PYBIND11_MODULE(_sim, module) {
  module.doc() = "The native scheduler of torch_trn; torch_trn.scheduler is its user interface.";
  module.def("schedule", &trn::Schedule, py::arg("tables"), py::arg("issued_for"), py::arg("constants"),
             py::arg("look_ahead"), py::arg("spans"), py::arg("extrapolate"),
             "Expands, issues and times an encoded Program (tables: pools, terms, refs, choices, instructions, ops; "
             "constants: semaphore, DMA packet, DMA horizon and ramp in ps, ramp start in permille). Returns "
             "(duration_ps, sums, instructions run rather than extrapolated, spans [n, (instruction, choice, start_ps, "
             "end_ps, reason, pool, count)]); sums are "
             "busy_ps by engine, limiter_ps, bandwidth_ps, instructions, waits_ps [engine][tile, slot][pool], idle "
             "time of DMA [tile, slot][pool] and by queue.");
  module.def("tile_matmul", &trn::Multiply, py::arg("stationary"), py::arg("moving"),
             "stationary [k, m] transposed x moving [k, n] in fp32, summed from row 0 of k on.");
}
