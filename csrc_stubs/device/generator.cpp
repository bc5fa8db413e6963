#include "generator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Utils.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <deque>

#include "../core/mersenne.h"
#include "guard.h"
#include "storage.h"

namespace trn {

namespace {

constexpr size_t kStateBytes = 16;  // what DTensor demands: uint64 seed, int64 offset
constexpr size_t kMaxSnapshots = 64;

bool same_position(const at::mt19937_data_pod& a, const at::mt19937_data_pod& b) {
  return a.left_ == b.left_ && a.next_ == b.next_ && a.state_ == b.state_;
}

// The engine after so many draws more. Above kFewDraws a jump is cheaper than drawing.
at::mt19937 moved_on(at::mt19937 engine, uint64_t draws) {
  constexpr uint64_t kFewDraws = uint64_t{1} << 24;
  if (draws > kFewDraws) {
    at::mt19937_data_pod data = engine.data();
    // Of the 624 words of a state, `used` have been drawn. A fresh engine has a state that counts as used up.
    const uint64_t used = data.left_ == 1 ? mersenne::kWords : data.next_;
    const uint64_t blocks = (used + draws - 1) / mersenne::kWords;
    mersenne::jump(data.state_, blocks);
    data.next_ = static_cast<uint32_t>(used + draws - blocks * mersenne::kWords);
    data.left_ = mersenne::kWords + 1 - static_cast<int>(data.next_);
    engine.set_data(data);
    return engine;
  }
  for (; draws > 0; --draws) engine();
  return engine;
}

// State is (seed, offset): offset counts the 32-bit draws since the seed. CPU kernels draw from the engine directly, so
// the offset is found when it is asked for, by replaying from the last place where it was known.
//
// One thing (seed, offset) cannot hold is the second normal of a pair that normal_ keeps for later on small tensors. A
// state that this process handed out restores it (a snapshot is kept, the 64 newest); any other state restores the
// engine alone and the kept normal is dropped.
class TrnGenerator final : public c10::GeneratorImpl {
 public:
  explicit TrnGenerator(c10::DeviceIndex device)
      : GeneratorImpl(c10::Device(kTrn, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        engine_(at::make_generator<at::CPUGeneratorImpl>()) {
    anchor_here(0);
  }

  const at::Generator& engine() const {
    catch_up();
    return engine_;
  }
  void skip(uint64_t draws) { *pending_ += draws; }

  void set_current_seed(uint64_t seed) override {
    cpu()->set_current_seed(seed);
    *pending_ = 0;
    anchor_here(0);
  }
  uint64_t current_seed() const override { return cpu()->current_seed(); }
  uint64_t seed() override {
    const uint64_t value = cpu()->seed();
    *pending_ = 0;
    anchor_here(0);
    return value;
  }

  uint64_t get_offset() const override { return known_offset() + *pending_; }

  // The draws that the engine itself has made.
  uint64_t known_offset() const {
    const auto target = cpu()->engine().data();
    if (!same_position(anchor_.data(), target)) {
      // `left_` counts down through the 624 words of a state, so only every 624th place needs the long comparison.
      at::mt19937 engine = anchor_;
      uint64_t draws = 0;
      int steps = (engine.data().left_ - target.left_ + at::MERSENNE_STATE_N) % at::MERSENNE_STATE_N;
      do {
        for (int step = 0; step < steps; ++step) engine();
        draws += static_cast<uint64_t>(steps);
        steps = at::MERSENNE_STATE_N;
      } while (!same_position(engine.data(), target));
      anchor_ = engine;
      anchor_offset_ += draws;
    }
    return anchor_offset_;
  }

  void set_offset(uint64_t offset) override {
    const uint64_t seed = current_seed();
    for (const Snapshot& known : snapshots_) {
      if (known.seed == seed && known.offset == offset) {
        cpu()->set_engine(known.engine);
        cpu()->set_next_float_normal_sample(known.next_float);
        cpu()->set_next_double_normal_sample(known.next_double);
        *pending_ = known.pending;
        anchor_here(offset - known.pending);
        return;
      }
    }
    // The nearest known place before the offset, or the seed.
    at::mt19937 engine(seed);
    uint64_t position = 0;
    for (const Snapshot& known : snapshots_) {
      const uint64_t drawn = known.offset - known.pending;
      if (known.seed == seed && drawn <= offset && drawn > position) {
        engine = known.engine;
        position = drawn;
      }
    }
    cpu()->set_engine(engine);
    cpu()->set_next_float_normal_sample(std::nullopt);
    cpu()->set_next_double_normal_sample(std::nullopt);
    *pending_ = offset - position;
    anchor_here(position);
  }

  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    const uint64_t words[2] = {current_seed(), get_offset()};
    remember(words[0], words[1]);
    at::Tensor state = at::detail::empty_cpu({static_cast<int64_t>(kStateBytes)}, at::kByte);
    std::memcpy(state.mutable_data_ptr(), words, kStateBytes);
    return state.getIntrusivePtr();
  }

  void set_state(const c10::TensorImpl& state) override {
    at::detail::check_rng_state(state);
    TORCH_CHECK(state.numel() == static_cast<int64_t>(kStateBytes), "RNG state of a trn generator is ", kStateBytes,
                " bytes (seed, offset), but got ", state.numel(), "; a CPU generator's state cannot be used here.");
    uint64_t words[2];
    std::memcpy(words, state.data(), kStateBytes);
    TORCH_CHECK(words[1] <= kMaxOffset, "RNG state of a trn generator has offset ", words[1], ", above the limit of ",
                kMaxOffset, " draws: the engine has to be advanced draw by draw.");
    cpu()->set_current_seed(words[0]);
    set_offset(words[1]);
  }

  void graphsafe_set_state(const c10::intrusive_ptr<c10::GeneratorImpl>& state) override {
    auto* other = dynamic_cast<TrnGenerator*>(state.get());
    TORCH_CHECK(other != nullptr, "graphsafe_set_state of a trn generator takes the state of a trn generator.");
    engine_ = other->engine_;
    pending_ = other->pending_;
    anchor_ = other->anchor_;
    anchor_offset_ = other->anchor_offset_;
  }
  c10::intrusive_ptr<c10::GeneratorImpl> graphsafe_get_state() const override {
    auto state = c10::make_intrusive<TrnGenerator>(device().index());
    state->engine_ = engine_;
    state->pending_ = pending_;
    state->anchor_ = anchor_;
    state->anchor_offset_ = anchor_offset_;
    return state;
  }

  static c10::DeviceType device_type() { return kTrn; }

 private:
  static constexpr uint64_t kMaxOffset = uint64_t{1} << 40;

  struct Snapshot {
    uint64_t seed, offset;
    uint64_t pending;  // of the offset, what the engine has not drawn
    at::mt19937 engine;
    std::optional<float> next_float;
    std::optional<double> next_double;
  };

  at::CPUGeneratorImpl* cpu() const { return static_cast<at::CPUGeneratorImpl*>(engine_.unsafeGetGeneratorImpl()); }

  // Draws what was skipped.
  void catch_up() const {
    if (C10_LIKELY(*pending_ == 0)) return;
    const uint64_t draws = std::exchange(*pending_, 0);
    const uint64_t offset = known_offset();
    cpu()->set_engine(moved_on(cpu()->engine(), draws));
    anchor_here(offset + draws);
  }

  void anchor_here(uint64_t offset) const {
    anchor_ = cpu()->engine();
    anchor_offset_ = offset;
  }

  void remember(uint64_t seed, uint64_t offset) const {
    for (auto known = snapshots_.begin(); known != snapshots_.end(); ++known) {
      if (known->seed == seed && known->offset == offset) {
        snapshots_.erase(known);
        break;
      }
    }
    at::CPUGeneratorImpl* generator = cpu();
    const auto next_float = generator->next_float_normal_sample();
    const auto next_double = generator->next_double_normal_sample();
    snapshots_.push_back({seed, offset, *pending_, generator->engine(), next_float, next_double});
    if (snapshots_.size() > kMaxSnapshots) snapshots_.pop_front();
  }

  TrnGenerator* clone_impl() const override {
    auto* copy = new TrnGenerator(device().index());
    copy->engine_ = engine_.clone();
    *copy->pending_ = *pending_;
    copy->anchor_ = anchor_;
    copy->anchor_offset_ = anchor_offset_;
    copy->snapshots_ = snapshots_;
    return copy;
  }

  at::Generator engine_;
  std::shared_ptr<uint64_t> pending_ = std::make_shared<uint64_t>(0);  // skipped, shared as the engine is
  mutable at::mt19937 anchor_;
  mutable uint64_t anchor_offset_ = 0;
  mutable std::deque<Snapshot> snapshots_;
};

std::vector<at::Generator>& generators() {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>;
    // One for each device that may come to exist: seeding does not settle how many there are.
    for (int index = 0; index < kMaxDevices; ++index) {
      made->push_back(at::make_generator<TrnGenerator>(static_cast<c10::DeviceIndex>(index)));
    }
    return made;
  }();
  return *all;
}

// Swaps the engine and the kept normals of two CPU generators.
void exchange(at::CPUGeneratorImpl* a, at::CPUGeneratorImpl* b) {
  std::scoped_lock lock(a->mutex_, b->mutex_);
  const at::mt19937 engine = a->engine();
  const auto next_float = a->next_float_normal_sample();
  const auto next_double = a->next_double_normal_sample();
  a->set_engine(b->engine());
  a->set_next_float_normal_sample(b->next_float_normal_sample());
  a->set_next_double_normal_sample(b->next_double_normal_sample());
  b->set_engine(engine);
  b->set_next_float_normal_sample(next_float);
  b->set_next_double_normal_sample(next_double);
}

void exchange_default(const at::Generator& engine) {
  auto* standard = static_cast<at::CPUGeneratorImpl*>(at::detail::getDefaultCPUGenerator().unsafeGetGeneratorImpl());
  exchange(standard, static_cast<at::CPUGeneratorImpl*>(engine.unsafeGetGeneratorImpl()));
}

std::mutex& swap_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

}  // namespace

const at::Generator& default_generator(int64_t device) {
  check_device_index(device);
  return generators()[static_cast<size_t>(device)];
}

void manual_seed_all(uint64_t seed) {
  for (at::Generator& generator : generators()) {
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_current_seed(seed);
  }
}

at::Generator new_generator(int64_t device) {
  check_device_index(device);
  return at::make_generator<TrnGenerator>(static_cast<c10::DeviceIndex>(device));
}

at::Generator engine_of(const at::Generator& generator) {
  TORCH_CHECK(generator.device().type() == kTrn, "Expected a 'trn' device type for generator but found '",
              generator.device().type(), "'");
  return static_cast<TrnGenerator*>(generator.unsafeGetGeneratorImpl())->engine();
}

void skip_draws(at::Generator generator, uint64_t draws) {
  std::lock_guard<std::mutex> lock(generator.mutex());
  static_cast<TrnGenerator*>(generator.unsafeGetGeneratorImpl())->skip(draws);
}

DefaultGeneratorSwap::DefaultGeneratorSwap(const at::Generator& generator) : engine_(engine_of(generator)) {
  swap_mutex().lock();
  exchange_default(engine_);
}

DefaultGeneratorSwap::~DefaultGeneratorSwap() {
  exchange_default(engine_);
  swap_mutex().unlock();
}

}  // namespace trn
