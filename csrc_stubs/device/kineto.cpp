#include "kineto.h"

#define FMT_HEADER_ONLY  // the wheel exports no fmt symbols
#include <GenericTraceActivity.h>
#include <libkineto.h>
#include <output_base.h>
#include <torch/csrc/profiler/standalone/privateuse1_profiler.h>

#include <map>

#include "../core/system.h"

namespace trn {

namespace {

thread_local std::vector<uint64_t> correlation_stack;

// Device spans are in simulated time. The window's first span is put at the window's start, so that a trace shows the
// same distances on every run; what comes after the end of the window is kept.
class Session final : public libkineto::IActivityProfilerSession {
 public:
  void start() override {
    correlation_stack.clear();
    origin_ps_ = HostClock::now_ps();
    Recorder::instance().start_trace();
    status_ = libkineto::TraceStatus::RECORDING;
  }
  void stop() override {
    records_ = Recorder::instance().stop_trace();
    status_ = libkineto::TraceStatus::PROCESSING;
  }
  std::vector<std::string> errors() override { return {}; }
  void processTrace(libkineto::ActivityLogger&) override {}

  void processTrace(libkineto::ActivityLogger& logger, libkineto::getLinkedActivityCallback linked, int64_t start_ns,
                    int64_t end_ns) override {
    buffer_ = std::make_unique<libkineto::CpuTraceBuffer>();
    buffer_->span = libkineto::TraceSpan(start_ns, end_ns, "trn simulated time");
    for (const Record& record : records_) {
      buffer_->emplace_activity(buffer_->span, libkineto::ActivityType::CONCURRENT_KERNEL, record.entry->name);
      auto& activity = *buffer_->activities.back();
      activity.startTime = start_ns + (record.start_ps - origin_ps_) / 1000;
      // Rounded up: a span of less than a nanosecond must not vanish.
      activity.endTime = activity.startTime + (record.duration_ps + 999) / 1000;
      activity.id = static_cast<int32_t>(record.correlation);
      activity.device = record.device;
      activity.resource = record.stream;
      activity.threadId = record.stream;
      activity.flow.id = static_cast<uint32_t>(record.correlation);
      activity.flow.type = libkineto::kLinkAsyncCpuGpu;
      activity.flow.start = 0;
      activity.linked = record.correlation == 0 ? nullptr : linked(static_cast<int32_t>(record.correlation));
      activity.addMetadataQuoted("bound", bound_name(record.entry->bound));
      activity.addMetadata("simulated_us", static_cast<double>(record.duration_ps) / 1e6);
      activity.addMetadata("hbm_bytes", record.entry->hbm_bytes);
      activity.log(logger);
    }
    status_ = libkineto::TraceStatus::READY;
  }

  std::unique_ptr<libkineto::DeviceInfo> getDeviceInfo() override { return nullptr; }
  std::vector<libkineto::ResourceInfo> getResourceInfos() override {
    std::map<std::pair<int, int>, bool> seen;
    std::vector<libkineto::ResourceInfo> resources;
    for (const Record& record : records_) {
      if (!seen.emplace(std::make_pair(record.device, record.stream), true).second) continue;
      resources.push_back({record.stream, record.stream, record.device, "trn stream " + std::to_string(record.stream)});
    }
    return resources;
  }
  std::unique_ptr<libkineto::CpuTraceBuffer> getTraceBuffer() override { return std::move(buffer_); }
  void pushCorrelationId(uint64_t id) override { correlation_stack.push_back(id); }
  void popCorrelationId() override {
    if (!correlation_stack.empty()) correlation_stack.pop_back();
  }

 private:
  int64_t origin_ps_ = 0;
  std::vector<Record> records_;
  std::unique_ptr<libkineto::CpuTraceBuffer> buffer_;
};

class TrnProfiler final : public libkineto::IActivityProfiler {
 public:
  const std::string& name() const override { return name_; }
  const std::set<libkineto::ActivityType>& availableActivities() const override { return activities_; }
  std::unique_ptr<libkineto::IActivityProfilerSession> configure(const std::set<libkineto::ActivityType>& wanted,
                                                                 const libkineto::Config&) override {
    // PRIVATEUSE1_RUNTIME does not ask for device spans: torch counts it among the activities of the CPU.
    return wanted.count(libkineto::ActivityType::CONCURRENT_KERNEL) > 0 ? std::make_unique<Session>() : nullptr;
  }
  std::unique_ptr<libkineto::IActivityProfilerSession> configure(int64_t, int64_t,
                                                                 const std::set<libkineto::ActivityType>& wanted,
                                                                 const libkineto::Config& config) override {
    return configure(wanted, config);
  }

 private:
  std::string name_ = "trn";
  std::set<libkineto::ActivityType> activities_ = {libkineto::ActivityType::CONCURRENT_KERNEL,
                                                   libkineto::ActivityType::PRIVATEUSE1_RUNTIME};
};

REGISTER_PRIVATEUSE1_PROFILER(TrnProfiler);

}  // namespace

uint64_t correlation_id() { return correlation_stack.empty() ? 0 : correlation_stack.back(); }

}  // namespace trn
