// torch_trn._sim: the scheduler for Python. Tables come as int64 arrays, results go as such.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "array.h"
#include "scheduler.h"

namespace py = pybind11;

namespace trn {
namespace {

using Table = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// Rows of a table, checked for their width.
class Rows {
 public:
  Rows(const Table& table, int64_t columns, const char* name) : data_(table.data()) {
    if (table.ndim() != 2 || table.shape(1) != columns) {
      throw std::invalid_argument(std::string(name) + " must be a table with " + std::to_string(columns) + " columns");
    }
    columns_ = columns;
    size_ = table.shape(0);
  }
  int64_t size() const { return size_; }
  const int64_t* operator[](int64_t row) const { return data_ + row * columns_; }

 private:
  const int64_t* data_;
  int64_t columns_;
  int64_t size_;
};

Program Decode(const Table& pools, const Table& terms, const Table& refs, const Table& instructions, const Table& ops) {
  Program program;
  const Rows pool_rows(pools, 2, "pools");
  for (int64_t i = 0; i < pool_rows.size(); ++i) {
    const int64_t slots = pool_rows[i][0];
    program.pools.push_back({slots, program.num_slots, pool_rows[i][1] != 0});
    program.num_slots += slots;
  }
  const Rows term_rows(terms, 2, "terms");
  for (int64_t i = 0; i < term_rows.size(); ++i) {
    program.terms.push_back({term_rows[i][0], term_rows[i][1]});
  }
  const Rows ref_rows(refs, 4, "refs");
  for (int64_t i = 0; i < ref_rows.size(); ++i) {
    const int64_t* row = ref_rows[i];
    program.refs.push_back({row[0], row[1], row[2], row[3]});
  }
  const Rows rows(instructions, 10, "instructions");
  for (int64_t i = 0; i < rows.size(); ++i) {
    const int64_t* row = rows[i];
    if (row[8] + row[9] > kMaxOperands) {
      throw std::invalid_argument("an instruction has " + std::to_string(row[8] + row[9]) +
                                  " operands; the scheduler takes at most " + std::to_string(kMaxOperands));
    }
    program.instructions.push_back(
        {row[0], row[1], row[2], row[3], row[4], row[5], static_cast<Weights>(row[6]), row[7], row[8], row[9]});
    program.num_queues = std::max(program.num_queues, row[1] + 1);
  }
  const Rows op_rows(ops, 3, "ops");
  for (int64_t i = 0; i < op_rows.size(); ++i) {
    program.ops.push_back({static_cast<Opcode>(op_rows[i][0]), op_rows[i][1], op_rows[i][2]});
  }
  return program;
}

py::array_t<int64_t> SpanTable(std::vector<Span> spans) {
  std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.start_ps < b.start_ps; });
  py::array_t<int64_t> table({static_cast<py::ssize_t>(spans.size()), py::ssize_t{6}});
  int64_t* out = table.mutable_data();
  for (const Span& span : spans) {
    *out++ = span.instruction;
    *out++ = span.start_ps;
    *out++ = span.end_ps;
    *out++ = static_cast<int64_t>(span.wait.reason);
    *out++ = span.wait.pool;
    *out++ = span.count;
  }
  return table;
}

py::tuple Schedule(const Table& pools, const Table& terms, const Table& refs, const Table& instructions,
                   const Table& ops, int64_t semaphore_ps, int64_t dma_packet_ps, bool spans) {
  const Program program = Decode(pools, terms, refs, instructions, ops);
  Scheduler scheduler(program, {semaphore_ps, dma_packet_ps}, spans);
  {
    py::gil_scoped_release release;
    // Issued in program order: the expanded stream goes straight to the scheduler.
    Expander(program).Run([&](const Issued& issued) { scheduler.Schedule(issued); });
  }
  const int64_t* busy = scheduler.busy_ps();
  const std::vector<int64_t>& waits = scheduler.waits_ps();
  py::array_t<int64_t> wait_table(static_cast<py::ssize_t>(waits.size()), waits.data());
  return py::make_tuple(scheduler.duration_ps(), py::make_tuple(busy[0], busy[1], busy[2], busy[3], busy[4]),
                        wait_table, scheduler.bandwidth_wait_ps(), scheduler.num_scheduled(),
                        SpanTable(scheduler.spans()));
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
  module.def("schedule", &trn::Schedule, py::arg("pools"), py::arg("terms"), py::arg("refs"), py::arg("instructions"),
             py::arg("ops"), py::arg("semaphore_ps"), py::arg("dma_packet_ps"), py::arg("spans"),
             "Expands and times an encoded Program. Returns (duration_ps, busy_ps by engine, "
             "waits_ps flat [engine][tile, slot][pool], bandwidth_wait_ps, instructions, "
             "spans [n, (instruction, start_ps, end_ps, reason, pool, count)]).");
  module.def("tile_matmul", &trn::Multiply, py::arg("stationary"), py::arg("moving"),
             "stationary [k, m] transposed x moving [k, n] in fp32, summed from row 0 of k on.");
}
