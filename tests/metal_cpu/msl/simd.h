// Barriers and simdgroup operations: calls into the engine, which stops the lane until all arrived.
#pragma once

// `convergent` and `nomerge` keep one call per place in the text. `const`: to Metal a simdgroup
// operation is no memory fence either, so loads may be kept across it.
#define EMU_COLLECTIVE __attribute__((convergent, nomerge))
// Where the call stands in the text: equal calls in the branches of an `if` would become one.
#define EMU_PLACE uint place = uint(__builtin_LINE()) << 8 | (__builtin_COLUMN() & 255)
extern "C" {
EMU_COLLECTIVE __attribute__((const)) uint64_t emu_simd(uint op, uint64_t a, uint64_t b, uint arg,
                                                           uint place);
EMU_COLLECTIVE __attribute__((const)) uint64_t emu_multiply(uint64_t a, uint64_t b, uint64_t c);
EMU_COLLECTIVE void emu_converge();
EMU_COLLECTIVE void emu_barrier(uint flags, uint place);
EMU_COLLECTIVE void emu_simd_barrier(uint flags, uint place);
void* emu_threadgroup(uint index, uint64_t size, uint64_t align);
void emu_atomic(const void* p, uint64_t size, uint write);
}

namespace emu {
// The numbers are those of the engine's `Op` and `Type`.
enum : uint {
  SUM, PRODUCT, MIN, MAX, AND, OR, XOR,
  SCAN_SUM, SCAN_PRODUCT, SCAN_SUM_EXCLUSIVE, SCAN_PRODUCT_EXCLUSIVE,
  BALLOT, SHUFFLE = 16, SHUFFLE_XOR, SHUFFLE_UP, SHUFFLE_DOWN, ROTATE_UP, ROTATE_DOWN, FILL_UP,
  FILL_DOWN, BROADCAST, BROADCAST_FIRST,
};

// The 32-bit type in which the engine computes for T, and its number. Metal has none of 64 bits.
template <class T>
struct lane_type;
#define EMU_LANE(T, WIDE, NUMBER)                                                                 \
  template <>                                                                                     \
  struct lane_type<T> {                                                                           \
    using wide = WIDE;                                                                            \
    static constexpr uint number = NUMBER << 8;                                                   \
  };
EMU_LANE(float, float, 0)
EMU_LANE(half, half, 1)
EMU_LANE(bfloat, float, 0)
EMU_LANE(char, int, 2)
EMU_LANE(int8_t, int, 2)
EMU_LANE(int16_t, int, 2)
EMU_LANE(int32_t, int, 2)
EMU_LANE(uint8_t, uint, 3)
EMU_LANE(uint16_t, uint, 3)
EMU_LANE(uint32_t, uint, 3)

template <class T>
EMU_INLINE uint64_t pack(T x) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <class T>
EMU_INLINE T unpack(uint64_t bits) {
  T x;
  __builtin_memcpy(&x, &bits, sizeof(T));
  return x;
}
template <class T>
EMU_INLINE T arithmetic(uint op, T x, uint place) {
  using W = typename lane_type<T>::wide;
  return T(unpack<W>(emu_simd(op | lane_type<T>::number, pack(W(x)), 0, 0, place)));
}
template <class T>
EMU_INLINE T move(uint op, T x, T filling, uint arg, uint place) {
  (void)lane_type<T>::number;
  return unpack<T>(emu_simd(op, pack(x), pack(filling), arg, place));
}
}  // namespace emu

#define EMU_SCALARS(M, ...)                                                                       \
  M(float, __VA_ARGS__) M(half, __VA_ARGS__) M(char, __VA_ARGS__) M(int8_t, __VA_ARGS__)          \
  M(int16_t, __VA_ARGS__) M(int32_t, __VA_ARGS__) M(uint8_t, __VA_ARGS__)                         \
  M(uint16_t, __VA_ARGS__) M(uint32_t, __VA_ARGS__)
#define EMU_VECTOR_OP(NAME, PARAMS, ARGS)                                                         \
  template <class T, int N>                                                                       \
  EMU_INLINE vec<T, N> NAME PARAMS {                                                              \
    EMU_EACH(N) x[i] = NAME ARGS;                                                                 \
    return x;                                                                                     \
  }

#define EMU_ARITHMETIC_ONE(T, NAME, OP)                                                           \
  EMU_INLINE T NAME(T x, EMU_PLACE) { return emu::arithmetic<T>(emu::OP, x, place); }
#define EMU_ARITHMETIC(NAME, OP)                                                                  \
  EMU_INLINE float __metal_##NAME(float x) { return emu::arithmetic<float>(emu::OP, x, 0); }      \
  namespace metal {                                                                               \
  EMU_SCALARS(EMU_ARITHMETIC_ONE, NAME, OP)                                                       \
  EMU_VECTOR_OP(NAME, (vec<T, N> x, EMU_PLACE), (T(x[i]), place))                                 \
  }
EMU_ARITHMETIC(simd_sum, SUM)
EMU_ARITHMETIC(simd_product, PRODUCT)
EMU_ARITHMETIC(simd_min, MIN)
EMU_ARITHMETIC(simd_max, MAX)
EMU_ARITHMETIC(simd_prefix_inclusive_sum, SCAN_SUM)
EMU_ARITHMETIC(simd_prefix_inclusive_product, SCAN_PRODUCT)
EMU_ARITHMETIC(simd_prefix_exclusive_sum, SCAN_SUM_EXCLUSIVE)
EMU_ARITHMETIC(simd_prefix_exclusive_product, SCAN_PRODUCT_EXCLUSIVE)
EMU_INLINE float __metal_simd_xor(float x) { return x; }

#define EMU_BITWISE_ONE(T, NAME, OP)                                                              \
  EMU_INLINE T NAME(T x, EMU_PLACE) { return emu::arithmetic<T>(emu::OP, x, place); }
#define EMU_BITWISE(NAME, OP)                                                                     \
  EMU_BITWISE_ONE(int8_t, NAME, OP) EMU_BITWISE_ONE(int16_t, NAME, OP)                            \
  EMU_BITWISE_ONE(int32_t, NAME, OP) EMU_BITWISE_ONE(uint8_t, NAME, OP)                           \
  EMU_BITWISE_ONE(uint16_t, NAME, OP) EMU_BITWISE_ONE(uint32_t, NAME, OP)                         \
  EMU_VECTOR_OP(NAME, (vec<T, N> x, EMU_PLACE), (T(x[i]), place))
namespace metal {
EMU_BITWISE(simd_and, AND)
EMU_BITWISE(simd_or, OR)
EMU_BITWISE(simd_xor, XOR)
}  // namespace metal

#define EMU_MOVE_ONE(T, NAME, OP)                                                                 \
  EMU_INLINE T NAME(T x, ushort arg, EMU_PLACE) {                                                 \
    return emu::move<T>(emu::OP, x, x, arg, place);                                               \
  }
#define EMU_MOVE(NAME, OP)                                                                        \
  EMU_INLINE uint16_t __metal_##NAME(uint16_t x, ushort arg) {                                    \
    return emu::move<uint16_t>(emu::OP, x, x, arg, 0);                                            \
  }                                                                                               \
  namespace metal {                                                                               \
  EMU_SCALARS(EMU_MOVE_ONE, NAME, OP)                                                             \
  EMU_VECTOR_OP(NAME, (vec<T, N> x, ushort arg, EMU_PLACE), (T(x[i]), arg, place))                \
  }
EMU_MOVE(simd_shuffle, SHUFFLE)
EMU_MOVE(simd_shuffle_xor, SHUFFLE_XOR)
EMU_MOVE(simd_shuffle_up, SHUFFLE_UP)
EMU_MOVE(simd_shuffle_down, SHUFFLE_DOWN)
EMU_MOVE(simd_shuffle_rotate_up, ROTATE_UP)
EMU_MOVE(simd_shuffle_rotate_down, ROTATE_DOWN)
EMU_MOVE(simd_broadcast, BROADCAST)

#define EMU_FILL_ONE(T, NAME, OP)                                                                 \
  EMU_INLINE T NAME(T x, T filling, ushort delta, ushort modulo = 32) {                           \
    return emu::move<T>(emu::OP, x, filling, uint(delta) | uint(modulo) << 8, 0);                 \
  }
#define EMU_FILL(NAME, OP)                                                                        \
  EMU_FILL_ONE(uint16_t, __metal_##NAME, OP)                                                      \
  namespace metal {                                                                               \
  EMU_SCALARS(EMU_FILL_ONE, NAME, OP)                                                             \
  EMU_VECTOR_OP(NAME, (vec<T, N> x, vec<T, N> filling, ushort delta),                             \
                (T(x[i]), T(filling[i]), delta))                                                  \
  }
EMU_FILL(simd_shuffle_and_fill_up, FILL_UP)
EMU_FILL(simd_shuffle_and_fill_down, FILL_DOWN)

EMU_INLINE ushort __metal_get_simdgroup_size(ushort) { return 32; }

namespace metal {
#define EMU_FIRST_ONE(T, NAME, OP)                                                                \
  EMU_INLINE T NAME(T x, EMU_PLACE) { return emu::move<T>(emu::OP, x, x, 0, place); }
EMU_SCALARS(EMU_FIRST_ONE, simd_broadcast_first, BROADCAST_FIRST)

struct simd_vote {
  using vote_t = uint64_t;
  vote_t mask;
  explicit constexpr simd_vote(vote_t v = 0) : mask(v) {}
  explicit constexpr operator vote_t() const { return mask; }
};
EMU_INLINE simd_vote simd_ballot(bool x, EMU_PLACE) {
  return simd_vote(emu_simd(emu::BALLOT, x, 0, 0, place));
}
EMU_INLINE bool simd_any(bool x, EMU_PLACE) { return emu_simd(emu::BALLOT, x, 0, 0, place) != 0; }
EMU_INLINE bool simd_all(bool x, EMU_PLACE) { return emu_simd(emu::BALLOT, !x, 0, 0, place) == 0; }

enum class mem_flags : uint {
  mem_none = 0, mem_threadgroup = 1, mem_device = 2, mem_texture = 4,
};
EMU_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(uint(a) | uint(b));
}
EMU_INLINE void threadgroup_barrier(mem_flags flags, EMU_PLACE) {
  emu_barrier(uint(flags), place);
}
EMU_INLINE void simdgroup_barrier(mem_flags flags, EMU_PLACE) {
  emu_simd_barrier(uint(flags), place);
}
}  // namespace metal

namespace emu {
// A threadgroup variable: its place in the engine's arena, the same for every thread of the group.
template <class T, uint INDEX>
EMU_INLINE threadgroup T& variable() {
  return *(threadgroup T*)emu_threadgroup(INDEX, sizeof(T), alignof(T));
}
}  // namespace emu
