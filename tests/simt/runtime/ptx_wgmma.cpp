// wgmma. Contract: slkernels/ptx/wgmma.h.
//
// From the issue until a wait covers it, the accumulators hold a NaN of ours; the operands are read, and the sums made,
// at that wait. The reads are those of an agent a warp (16 rows of A, all of B) that knows what the warp knew when it
// issued: an operand that is overwritten too early, or that was not waited for, is a race whichever comes first.
#include <cuda_fp16.h>

#include <array>
#include <cstring>
#include <map>

#include "internal.h"
#include "simt/ptx_wgmma.h"

namespace simt {
namespace {

constexpr int kWarps = 4, kLanes = 32, kM = 64, kK = 16;
constexpr uint32_t kInFlight = 0x7fc0dead;  // a quiet NaN that no arithmetic makes

// PTX ISA, "Matrix Descriptor Format".
struct Operand {
  uint32_t start, k8, rows8, base_offset;
  int swizzle_bits;

  explicit Operand(uint64_t d)
      : start(uint32_t(d & 0x3fff) << 4),
        k8(uint32_t(d >> 16 & 0x3fff) << 4),
        rows8(uint32_t(d >> 32 & 0x3fff) << 4),
        base_offset(uint32_t(d >> 49 & 7)),
        swizzle_bits((4 - int(d >> 62)) % 4) {}  // 0: none, 1: 128 bytes, 2: 64, 3: 32

  // PTX ISA, "Strides" and "Shared Memory Matrix Layout", K-major: the address of 8 values of K, unit 0 or 1 of a row.
  uint32_t unit(int row, int unit_of_k) const {
    if (!swizzle_bits) return start + row / 8 * rows8 + row % 8 * 16 + unit_of_k * k8;
    const uint32_t linear = start + row / 8 * rows8 + row % 8 * (16u << swizzle_bits) + unit_of_k * 16;
    return linear ^ ((linear >> 7 & ((1u << swizzle_bits) - 1)) << 4);
  }
  // N-major, 128-byte swizzle: 8 columns from 8 * unit_of_n on of a row of K. "k8" holds the offset from panel to
  // panel, "rows8" that from 8 rows of K to the next.
  uint32_t n_major_unit(int k, int unit_of_n) const {
    const uint32_t linear = start + unit_of_n / 8 * k8 + unit_of_n % 8 * 16 + k / 8 * rows8 + k % 8 * 128;
    return linear ^ ((linear >> 7 & 7) << 4);
  }
};

float to_float(WgmmaType type, uint16_t value) {
  if (type == WgmmaType::f16) {
    __half_raw raw;
    raw.x = value;
    return __half2float(__half(raw));
  }
  const uint32_t bits = uint32_t(value) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Accumulators of one thread, by the address of their first register.
struct Accumulator {
  float* registers;
  bool in_flight = false, fenced = false;  // fenced: since the last wait that ended on it
  int last_op = -1;
  std::vector<float> sums;  // in flight: the sums so far; else: what the last wait left in the registers
};

struct Issue {  // by one lane
  WgmmaType type;
  float* registers;
  int n;
  const uint32_t* a_registers;
  uint64_t a, b;
  bool accumulate;
  void* pc;
};

struct Op {
  Issue what;
  int warps_here = 0;
  bool done = false;
  std::array<float*, kWarps * kLanes> registers = {};
  std::array<const uint32_t*, kWarps * kLanes> a_registers = {};
  std::array<std::array<uint32_t, 4>, kWarps * kLanes> a_issued = {};
  std::array<Clock, kWarps> knows;
};

struct Warp {
  int issued = 0, committed = 0;
  bool fenced = false;      // since the last wait
  std::vector<int> groups;  // the number of ops issued when each was committed
  int agent = -1;
  std::array<int, kLanes> waited = {};  // ops
  std::array<std::vector<Accumulator>, kLanes> accumulators;
};

struct Warpgroup {
  std::vector<Op> ops;
  std::array<Warp, kWarps> warps;
};
struct Warpgroups {
  std::map<int, Warpgroup> of;
};

int thread_in_group() {
  return running->view.linear % (kWarps * kLanes);
}
Warpgroup& my_group() {
  return block_state<Warpgroups>().of[running->view.linear / (kWarps * kLanes)];
}
Warp& my_warp() {
  return my_group().warps[thread_in_group() / kLanes];
}

void check_whole(uint32_t mask, void* pc) {
  const Dim3 b = block_dim();
  if (mask != 0xffffffffu || b.x * b.y * b.z % (kWarps * kLanes))
    fault("wgmma: the block is not made of whole warpgroups of 128 threads", pc);
}

Accumulator& find_accumulator(std::vector<Accumulator>& known, float* registers) {
  for (Accumulator& a : known)
    if (a.registers == registers) return a;
  known.push_back({registers, false, false, -1, {}});
  return known.back();
}

bool holds_marks(const Accumulator& a) {
  for (size_t i = 0; i < a.sums.size(); ++i)
    if (std::memcmp(&a.registers[i], &kInFlight, 4)) return false;
  return true;
}

void check_fence(const Warp& warp, const Accumulator& a, const Issue& issue, int count) {
  if (a.last_op < 0 && !warp.fenced)
    fault("missing wgmma.fence before the first wgmma on these accumulators", issue.pc);
  if (a.last_op < 0 || a.fenced) return;
  const bool touched =
      int(a.sums.size()) != count || std::memcmp(a.registers, a.sums.data(), size_t(count) * sizeof(float)) != 0;
  if (touched || !issue.accumulate)
    fault(std::string("missing wgmma.fence: the accumulators were ") +
              (touched ? "written" : "free for use, and are begun anew,") + " after the last wgmma.wait_group",
          issue.pc);
}

void issue_warp(void* const* lanes, uint32_t mask) {
  const Issue& first = *static_cast<Issue*>(lanes[0]);
  check_whole(mask, first.pc);
  Warpgroup& group = my_group();
  const int w = thread_in_group() / kLanes, index = group.warps[w].issued++;
  Warp& warp = group.warps[w];
  if (size_t(index) == group.ops.size()) {
    group.ops.emplace_back();
    group.ops.back().what = first;
  }
  Op& op = group.ops[index];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Issue& mine = *static_cast<Issue*>(lanes[lane]);
    if (mine.n != op.what.n || mine.a != op.what.a || mine.b != op.what.b || mine.accumulate != op.what.accumulate ||
        mine.type != op.what.type || !mine.a_registers != !op.what.a_registers)
      fault("wgmma: lane " + std::to_string(lane) + " of warp " + std::to_string(w) +
                " of the warpgroup gives other operands than the first warp",
            mine.pc);
    const int count = mine.n / 2;
    Accumulator& a = find_accumulator(warp.accumulators[lane], mine.registers);
    if (a.in_flight) {
      if (int(a.sums.size()) != count) fault("wgmma: another shape on accumulators that are in flight", mine.pc);
      if (!holds_marks(a)) fault("wgmma: accumulators were written while in flight", mine.pc);
    } else {
      check_fence(warp, a, mine, count);
      a.sums.assign(mine.registers, mine.registers + count);
      for (int i = 0; i < count; ++i) std::memcpy(&mine.registers[i], &kInFlight, 4);
      a.in_flight = true;
    }
    a.last_op = index;
    const size_t thread = size_t(w) * kLanes + lane;
    op.registers[thread] = mine.registers;
    op.a_registers[thread] = mine.a_registers;
    if (mine.a_registers) std::copy_n(mine.a_registers, 4, op.a_issued[thread].begin());
  }
  ++op.warps_here;
  op.knows[w] = release_warp();
}

void read_unit(WgmmaType type, uint32_t address, float* values, void* pc) {
  const void* p = from_shared_address(address);
  access(p, 16, false, pc, Proxy::async);
  uint16_t bits[8];
  std::memcpy(bits, p, 16);
  for (int i = 0; i < 8; ++i) values[i] = to_float(type, bits[i]);
}

// mma's fragments of the warp's 16 rows, as they were when the wgmma was issued.
void read_a_registers(const Op& op, int w, float (&a)[kM][kK]) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e) {
        const int row = 16 * w + lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8 + e;
        const uint32_t pair = op.a_issued[size_t(w) * kLanes + lane][i];
        a[row][column] = to_float(op.what.type, uint16_t(pair >> 16 * e));
      }
}

void perform(Warpgroup& group, Op& op) {
  op.done = true;
  const int n = op.what.n;
  const WgmmaType type = op.what.type;
  const Operand a_at(op.what.a), b_at(op.what.b);
  if (a_at.base_offset || b_at.base_offset)
    fault("wgmma: a base offset other than 0 in a matrix descriptor is not modelled", op.what.pc);
  static float a[kM][kK], b[256][kK];
  for (int w = 0; w < kWarps; ++w) {
    Warp& warp = group.warps[w];
    if (warp.agent < 0) warp.agent = new_agent("the wgmma of warp " + std::to_string(w) + " of a warpgroup");
    run_agent(warp.agent, op.knows[w], [&] {
      if (op.what.a_registers) {
        read_a_registers(op, w, a);
        for (int k = 0; k < kK; ++k)
          for (int unit = 0; unit < n / 8; ++unit) {
            float values[8];
            read_unit(type, b_at.n_major_unit(k, unit), values, op.what.pc);
            for (int i = 0; i < 8; ++i) b[8 * unit + i][k] = values[i];
          }
        return;
      }
      for (int row = 16 * w; row < 16 * w + 16; ++row)
        for (int unit = 0; unit < 2; ++unit) read_unit(type, a_at.unit(row, unit), &a[row][8 * unit], op.what.pc);
      for (int row = 0; row < n; ++row)
        for (int unit = 0; unit < 2; ++unit) read_unit(type, b_at.unit(row, unit), &b[row][8 * unit], op.what.pc);
    });
  }
  for (int t = 0; t < kWarps * kLanes; ++t) {
    const int lane = t % kLanes;
    Accumulator& acc = find_accumulator(group.warps[t / kLanes].accumulators[lane], op.registers[t]);
    for (int i = 0; i < n / 2; ++i) {
      const int row = 16 * (t / kLanes) + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      float sum = 0;  // products of bf16 are exact; the hardware's order and rounding of these sums are its own
      for (int k = 0; k < kK; ++k) sum += a[row][k] * b[column][k];
      acc.sums[i] = (op.what.accumulate ? acc.sums[i] : 0.f) + sum;
    }
  }
}

void check_wgmma_at_exit() {
  auto& of = block_state<Warpgroups>().of;
  const auto it = of.find(running->view.linear / (kWarps * kLanes));
  if (it == of.end()) return;
  const Warp& warp = it->second.warps[thread_in_group() / kLanes];
  if (warp.committed < warp.issued)
    fault("the thread ends with a wgmma that wgmma.commit_group never committed",
          it->second.ops[warp.committed].what.pc);
  const int waited = warp.waited[running->view.lane];
  if (waited < warp.issued)
    fault("the thread ends with wgmma in flight: no wgmma.wait_group covers it", it->second.ops[waited].what.pc);
}

}  // namespace

void wgmma_fence(void* pc) {
  warp_collective(
      "wgmma.fence", 0xffffffffu, nullptr,
      [](void* const*, uint32_t) {
        Warp& warp = my_warp();
        warp.fenced = true;
        for (auto& lane : warp.accumulators)
          for (Accumulator& a : lane) a.fenced = true;
      },
      false, pc);
}

void wgmma(WgmmaType type, float* registers, int n, const uint32_t* a_registers, uint64_t a, uint64_t b,
           bool accumulate, void* pc) {
  at_thread_exit(check_wgmma_at_exit);
  Issue issue = {type, registers, n, a_registers, a, b, accumulate, pc};
  warp_collective("wgmma.mma_async", 0xffffffffu, &issue, issue_warp, false, pc);
}

void wgmma_commit(void* pc) {
  warp_collective(
      "wgmma.commit_group", 0xffffffffu, nullptr,
      [](void* const*, uint32_t) {
        Warp& warp = my_warp();
        warp.committed = warp.issued;
        warp.groups.push_back(warp.issued);
      },
      false, pc);
}

void wgmma_wait(size_t pending, void* pc) {
  warp_collective(
      "wgmma.wait_group", 0xffffffffu, nullptr, [](void* const*, uint32_t) { my_warp().fenced = false; }, false, pc);
  Warpgroup& group = my_group();
  const int w = thread_in_group() / kLanes, lane = running->view.lane;
  Warp& warp = group.warps[w];
  if (warp.groups.size() <= pending) return;
  const int target = warp.groups[warp.groups.size() - 1 - pending], from = warp.waited[lane];
  if (target <= from) return;
  wait_until(
      "wgmma.wait_group: not all warps of the warpgroup have issued the wgmma",
      [&] {
        for (int i = from; i < target; ++i)
          if (group.ops[i].warps_here < kWarps) return false;
        return true;
      },
      pc);
  for (int i = from; i < target; ++i) {
    const Op& op = group.ops[i];
    const uint32_t* registers = op.a_registers[thread_in_group()];
    if (registers && std::memcmp(registers, op.a_issued[thread_in_group()].data(), 16))
      fault("wgmma: A's registers were written while a wgmma was in flight on them", op.what.pc);
  }
  for (int i = from; i < target; ++i)
    if (!group.ops[i].done) perform(group, group.ops[i]);
  warp.waited[lane] = target;
  for (Accumulator& a : warp.accumulators[lane]) {
    if (!a.in_flight || a.last_op >= target) continue;
    if (!holds_marks(a)) fault("accumulators were written while a wgmma was in flight on them", pc);
    std::memcpy(a.registers, a.sums.data(), a.sums.size() * sizeof(float));
    a.in_flight = a.fenced = false;
  }
  acquire(group.ops[target - 1].knows[w]);
}

}  // namespace simt
