// wgmma: D[64, N] (+)= A[64, 16] B[N, 16]^T by the 128 threads of a warpgroup (4 warps, the first's number a multiple
// of 4), asynchronously. bf16 or fp16 operands, fp32 accumulators in registers. A and B lie in shared memory and are
// K-major; or A in registers, and B in shared memory and N-major (the rows of a row-major [K, N] matrix). PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions". sm_90a.
//
// The order of a chain, which all 128 threads run with the same descriptors:
//   wgmma_fence()      before the first, and whenever ordinary code has touched the accumulators, or A's registers,
//   since wgmma_bf16<N>(..)  any number, on the same accumulators wgmma_commit()     makes a group of them
//   wgmma_wait<n>()    until at most n of the latest groups are unfinished: only then may the accumulators of the
//                      others be looked at, and their operands be overwritten
//   wgmma_settle(d)    after the wait, before ordinary code looks at d
//
// Accumulators ("Register Fragments", D of .m64nNk16): thread t of the warpgroup holds in d[i]
//   row 16 (t / 32) + (t % 32) / 4 + 8 ((i / 2) % 2),  column 8 (i / 4) + 2 (t % 4) + i % 2.
#pragma once

#include "slkernels/ptx/shared_address.h"

namespace slk::ptx {

enum class Swizzle : int { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

// PTX ISA, "Matrix Descriptor Format": where a K-major operand lies in shared memory. Offsets in bytes.
//   swizzled: rows of 32, 64 or 128 bytes, packed; `rows8` is the offset from 8 rows to the next 8 (8 rows' bytes when
//             the tile is packed), `k8` is not used. A step of 16 along K adds 32 bytes to the start.
//   none:     blocks of 8 rows by 16 bytes, each 128 packed bytes; `rows8` is the offset from a block to that of the
//             next 8 rows, `k8` to that of the next 8 values of K.
// The tile starts at a multiple of 8 rows' bytes, so that the base offset is 0.
__device__ inline uint64_t matrix_descriptor(const void* start, Swizzle swizzle, uint32_t rows8, uint32_t k8 = 16) {
  return uint64_t((shared_address(start) & 0x3ffff) >> 4) | uint64_t(k8 >> 4) << 16 | uint64_t(rows8 >> 4) << 32 |
         uint64_t(swizzle) << 62;
}
// An N-major operand in 128-byte swizzle: panels of 64 columns, rows of K packed at 128 bytes. Offsets in bytes: from 8
// rows of K to the next 8 (1024 when the panel is packed), and from a panel to the next. A step of 16 along K adds 2048
// bytes.
__device__ inline uint64_t matrix_descriptor_n_major(const void* start, uint32_t k8, uint32_t panel) {
  return matrix_descriptor(start, Swizzle::bytes128, k8, panel);
}
// The same operand, `bytes` further along K.
__device__ inline uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace slk::ptx

#ifdef SLK_SIMT
#include "simt/ptx_wgmma.h"
#else

namespace slk::ptx {

// wgmma.fence
__device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// wgmma.commit_group
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// wgmma.wait_group
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: keeps the compiler, which sees no tie between a wait and registers, from moving uses of d above it.
template <int M>
__device__ inline void wgmma_settle(float (&d)[M]) {
#pragma unroll
  for (int i = 0; i < M; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

namespace detail {
template <int N>
struct Wgmma;
template <int N>
struct WgmmaF16;
// A in registers, B N-major; the sizes that kernels use.
template <int N>
struct WgmmaRegisters;
template <int N>
struct WgmmaRegistersF16;

// Each size has four registers more than the one before: the lists of operands grow line by line.
// clang-format off
#define SLK_REGISTERS_8 "%0,%1,%2,%3"
#define SLK_OPERANDS_8(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define SLK_REGISTERS_16 SLK_REGISTERS_8 ",%4,%5,%6,%7"
#define SLK_OPERANDS_16(d) SLK_OPERANDS_8(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define SLK_REGISTERS_24 SLK_REGISTERS_16 ",%8,%9,%10,%11"
#define SLK_OPERANDS_24(d) SLK_OPERANDS_16(d), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define SLK_REGISTERS_32 SLK_REGISTERS_24 ",%12,%13,%14,%15"
#define SLK_OPERANDS_32(d) SLK_OPERANDS_24(d), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define SLK_REGISTERS_40 SLK_REGISTERS_32 ",%16,%17,%18,%19"
#define SLK_OPERANDS_40(d) SLK_OPERANDS_32(d), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define SLK_REGISTERS_48 SLK_REGISTERS_40 ",%20,%21,%22,%23"
#define SLK_OPERANDS_48(d) SLK_OPERANDS_40(d), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define SLK_REGISTERS_56 SLK_REGISTERS_48 ",%24,%25,%26,%27"
#define SLK_OPERANDS_56(d) SLK_OPERANDS_48(d), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define SLK_REGISTERS_64 SLK_REGISTERS_56 ",%28,%29,%30,%31"
#define SLK_OPERANDS_64(d) SLK_OPERANDS_56(d), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define SLK_REGISTERS_72 SLK_REGISTERS_64 ",%32,%33,%34,%35"
#define SLK_OPERANDS_72(d) SLK_OPERANDS_64(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define SLK_REGISTERS_80 SLK_REGISTERS_72 ",%36,%37,%38,%39"
#define SLK_OPERANDS_80(d) SLK_OPERANDS_72(d), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define SLK_REGISTERS_88 SLK_REGISTERS_80 ",%40,%41,%42,%43"
#define SLK_OPERANDS_88(d) SLK_OPERANDS_80(d), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define SLK_REGISTERS_96 SLK_REGISTERS_88 ",%44,%45,%46,%47"
#define SLK_OPERANDS_96(d) SLK_OPERANDS_88(d), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define SLK_REGISTERS_104 SLK_REGISTERS_96 ",%48,%49,%50,%51"
#define SLK_OPERANDS_104(d) SLK_OPERANDS_96(d), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define SLK_REGISTERS_112 SLK_REGISTERS_104 ",%52,%53,%54,%55"
#define SLK_OPERANDS_112(d) SLK_OPERANDS_104(d), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define SLK_REGISTERS_120 SLK_REGISTERS_112 ",%56,%57,%58,%59"
#define SLK_OPERANDS_120(d) SLK_OPERANDS_112(d), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define SLK_REGISTERS_128 SLK_REGISTERS_120 ",%60,%61,%62,%63"
#define SLK_OPERANDS_128(d) SLK_OPERANDS_120(d), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define SLK_REGISTERS_136 SLK_REGISTERS_128 ",%64,%65,%66,%67"
#define SLK_OPERANDS_136(d) SLK_OPERANDS_128(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define SLK_REGISTERS_144 SLK_REGISTERS_136 ",%68,%69,%70,%71"
#define SLK_OPERANDS_144(d) SLK_OPERANDS_136(d), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define SLK_REGISTERS_152 SLK_REGISTERS_144 ",%72,%73,%74,%75"
#define SLK_OPERANDS_152(d) SLK_OPERANDS_144(d), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define SLK_REGISTERS_160 SLK_REGISTERS_152 ",%76,%77,%78,%79"
#define SLK_OPERANDS_160(d) SLK_OPERANDS_152(d), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define SLK_REGISTERS_168 SLK_REGISTERS_160 ",%80,%81,%82,%83"
#define SLK_OPERANDS_168(d) SLK_OPERANDS_160(d), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define SLK_REGISTERS_176 SLK_REGISTERS_168 ",%84,%85,%86,%87"
#define SLK_OPERANDS_176(d) SLK_OPERANDS_168(d), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define SLK_REGISTERS_184 SLK_REGISTERS_176 ",%88,%89,%90,%91"
#define SLK_OPERANDS_184(d) SLK_OPERANDS_176(d), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define SLK_REGISTERS_192 SLK_REGISTERS_184 ",%92,%93,%94,%95"
#define SLK_OPERANDS_192(d) SLK_OPERANDS_184(d), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define SLK_REGISTERS_200 SLK_REGISTERS_192 ",%96,%97,%98,%99"
#define SLK_OPERANDS_200(d) SLK_OPERANDS_192(d), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define SLK_REGISTERS_208 SLK_REGISTERS_200 ",%100,%101,%102,%103"
#define SLK_OPERANDS_208(d) SLK_OPERANDS_200(d), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define SLK_REGISTERS_216 SLK_REGISTERS_208 ",%104,%105,%106,%107"
#define SLK_OPERANDS_216(d) SLK_OPERANDS_208(d), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define SLK_REGISTERS_224 SLK_REGISTERS_216 ",%108,%109,%110,%111"
#define SLK_OPERANDS_224(d) SLK_OPERANDS_216(d), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define SLK_REGISTERS_232 SLK_REGISTERS_224 ",%112,%113,%114,%115"
#define SLK_OPERANDS_232(d) SLK_OPERANDS_224(d), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define SLK_REGISTERS_240 SLK_REGISTERS_232 ",%116,%117,%118,%119"
#define SLK_OPERANDS_240(d) SLK_OPERANDS_232(d), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define SLK_REGISTERS_248 SLK_REGISTERS_240 ",%120,%121,%122,%123"
#define SLK_OPERANDS_248(d) SLK_OPERANDS_240(d), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define SLK_REGISTERS_256 SLK_REGISTERS_248 ",%124,%125,%126,%127"
#define SLK_OPERANDS_256(d) SLK_OPERANDS_248(d), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// A, B and the predicate follow the N / 2 accumulators in the operands' numbering.
#define SLK_WGMMA_OF(STRUCT, TYPE, N, A, B, P)                                                          \
  template <>                                                                                           \
  struct STRUCT<N> {                                                                                    \
    __device__ static void issue(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SLK_REGISTERS_##N \
                   "}, " A ", " B ", p, 1, 1, 0, 0;\n}\n"                                               \
                   : SLK_OPERANDS_##N(d)                                                                \
                   : "l"(a), "l"(b), "r"(accumulate));                                                  \
    }                                                                                                   \
  };
#define SLK_WGMMA(N, A, B, P) \
  SLK_WGMMA_OF(Wgmma, "bf16", N, A, B, P) SLK_WGMMA_OF(WgmmaF16, "f16", N, A, B, P)
SLK_WGMMA(8, "%4", "%5", "%6")
SLK_WGMMA(16, "%8", "%9", "%10")
SLK_WGMMA(24, "%12", "%13", "%14")
SLK_WGMMA(32, "%16", "%17", "%18")
SLK_WGMMA(40, "%20", "%21", "%22")
SLK_WGMMA(48, "%24", "%25", "%26")
SLK_WGMMA(56, "%28", "%29", "%30")
SLK_WGMMA(64, "%32", "%33", "%34")
SLK_WGMMA(72, "%36", "%37", "%38")
SLK_WGMMA(80, "%40", "%41", "%42")
SLK_WGMMA(88, "%44", "%45", "%46")
SLK_WGMMA(96, "%48", "%49", "%50")
SLK_WGMMA(104, "%52", "%53", "%54")
SLK_WGMMA(112, "%56", "%57", "%58")
SLK_WGMMA(120, "%60", "%61", "%62")
SLK_WGMMA(128, "%64", "%65", "%66")
SLK_WGMMA(136, "%68", "%69", "%70")
SLK_WGMMA(144, "%72", "%73", "%74")
SLK_WGMMA(152, "%76", "%77", "%78")
SLK_WGMMA(160, "%80", "%81", "%82")
SLK_WGMMA(168, "%84", "%85", "%86")
SLK_WGMMA(176, "%88", "%89", "%90")
SLK_WGMMA(184, "%92", "%93", "%94")
SLK_WGMMA(192, "%96", "%97", "%98")
SLK_WGMMA(200, "%100", "%101", "%102")
SLK_WGMMA(208, "%104", "%105", "%106")
SLK_WGMMA(216, "%108", "%109", "%110")
SLK_WGMMA(224, "%112", "%113", "%114")
SLK_WGMMA(232, "%116", "%117", "%118")
SLK_WGMMA(240, "%120", "%121", "%122")
SLK_WGMMA(248, "%124", "%125", "%126")
SLK_WGMMA(256, "%128", "%129", "%130")
#undef SLK_WGMMA
#undef SLK_WGMMA_OF
#define SLK_WGMMA_OF(STRUCT, TYPE, N, A, B, P)                                                                        \
  template <>                                                                                                         \
  struct STRUCT<N> {                                                                                                  \
    __device__ static void issue(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" SLK_REGISTERS_##N "}, {" A "}, " \
                   B ", p, 1, 1, 1;\n}\n"                                                                             \
                   : SLK_OPERANDS_##N(d)                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                            \
    }                                                                                                                 \
  };
#define SLK_WGMMA(N, A, B, P) \
  SLK_WGMMA_OF(WgmmaRegisters, "bf16", N, A, B, P) SLK_WGMMA_OF(WgmmaRegistersF16, "f16", N, A, B, P)
SLK_WGMMA(64, "%32,%33,%34,%35", "%36", "%37")
SLK_WGMMA(128, "%64,%65,%66,%67", "%68", "%69")
SLK_WGMMA(256, "%128,%129,%130,%131", "%132", "%133")
#undef SLK_WGMMA
#undef SLK_WGMMA_OF
// clang-format on
}  // namespace detail

// wgmma.mma_async.m64nNk16.f32.bf16.bf16, N a multiple of 8 up to 256: d = a b^T, plus d if `accumulate`.
template <int N>
__device__ inline void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  detail::Wgmma<N>::issue(d, a, b, accumulate);
}

template <int N>
__device__ inline void wgmma_f16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  detail::WgmmaF16<N>::issue(d, a, b, accumulate);
}

// The same with A in registers, as mma's fragments of 16 rows a warp (slkernels/ptx/mma.h), which stay as they are
// until a wait; and B N-major in 128-byte swizzle (matrix_descriptor_n_major): d = a b, plus d if `accumulate`.
template <int N>
__device__ inline void wgmma_registers_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  detail::WgmmaRegisters<N>::issue(d, a, b, accumulate);
}
template <int N>
__device__ inline void wgmma_registers_f16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  detail::WgmmaRegistersF16<N>::issue(d, a, b, accumulate);
}

}  // namespace slk::ptx
#endif
