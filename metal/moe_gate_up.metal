// equation: h = silu(G x) * (U x) for each expert that a token chose, then for the shared expert;
//           G and U are packed: w = scale * q + bias, one scale and bias per Group columns
// shapes:   x [N, Hidden]; experts [N, K], those of one token distinct; weight [E, 2 Inner, words],
//           rows of G before rows of U, scales and biases [E, 2 Inner, Hidden / Group];
//           shared_* the same without E, of Shared rows; h [N, K Inner + Shared]
// types:    x, h T (float, half, bfloat); experts, weight uint; scales, biases any float;
//           arithmetic in float, one rounding
// template: T; N 1 to 8; K up to 32; Hidden; Inner, Shared, both even; Simdgroups; Bits (4, 8),
//           Group, Words (4, 2, 1: packed words that a lane loads at once) and for the shared
//           expert SharedBits, SharedGroup, SharedWords
// grid:     (32, Simdgroups * blocks, 1 + N K), threadgroup (32, Simdgroups, 1): z 0 is the shared
//           expert, z 1 + p that of pair p, left to the first pair with the same expert; a
//           simdgroup computes two elements of its expert's h for every token that chose it
// needs:    4 * N sums and 4 * Words words per thread in registers; no threadgroup memory, no
//           barrier
// traffic:  the packed rows of each expert that was chosen, once; x from the cache for every row
// checked:  executed on the CPU only

enum : uint { ABSENT = 0xffffffffu };

inline void fetch(const device uint* p, thread uint (&w)[1]) { w[0] = p[0]; }
inline void fetch(const device uint* p, thread uint (&w)[2]) {
  const uint2 v = *reinterpret_cast<const device uint2*>(p);
  w[0] = v.x;
  w[1] = v.y;
}
inline void fetch(const device uint* p, thread uint (&w)[4]) {
  const uint4 v = *reinterpret_cast<const device uint4*>(p);
  w[0] = v.x;
  w[1] = v.y;
  w[2] = v.z;
  w[3] = v.w;
}

// Part of a word as four floats, exactly. A value's bits become the mantissa of a number between 1
// and 2 and the multiply-add takes the 1 away: shifts and conversions take four times as long.
template <int Bits>
inline float4 unpack(uint word, int part);
template <>
inline float4 unpack<4>(uint word, int part) {
  const uint v = part == 0 ? word : word >> 16;
  const uint4 m = (uint4(v) & uint4(0xfu, 0xf0u, 0xf00u, 0xf000u)) | uint4(0x3f800000u);
  const float4 unit = float4(8388608.0f, 524288.0f, 32768.0f, 2048.0f);
  return fma(as_type<float4>(m), unit, -unit);
}
template <>
inline float4 unpack<8>(uint word, int) {
  const uint v = word >> 16;
  const uint4 mask = uint4(0xffu, 0xff00u, 0xffu, 0xff00u);
  const uint4 m = (uint4(word, word, v, v) & mask) | uint4(0x3f800000u);
  const float4 unit = float4(8388608.0f, 32768.0f, 8388608.0f, 32768.0f);
  return fma(as_type<float4>(m), unit, -unit);
}

// The products of R rows of a packed matrix with M rows of x, these times their factors, added to
// this lane's sums. Rows of x start at `from`; ABSENT ones are left out.
template <int Bits, int Group, int Words, int Columns, int M, int R, typename T, typename S>
inline void add_products(const device uint* weight, const device S* scales, const device S* biases,
                         thread const uint (&rows)[R], const device T* x,
                         thread const uint (&from)[M], thread const float (&factor)[M], uint lane,
                         thread float (&sums)[M][R]) {
  const uint packed = Columns * Bits / 32;
  for (uint at = lane * Words; at < packed; at += 32 * Words) {
    uint w[R][Words];
    float scale[R], bias[R];
    const uint group = at * (32 / Bits) / Group;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      fetch(weight + rows[r] * packed + at, w[r]);
      scale[r] = float(scales[rows[r] * (Columns / Group) + group]);
      bias[r] = float(biases[rows[r] * (Columns / Group) + group]);
    }
#pragma unroll
    for (int part = 0; part < Words * 8 / Bits; ++part) {
      float4 q[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float4 raw = unpack<Bits>(w[r][part * Bits / 8], part % (8 / Bits));
        q[r] = fma(raw, float4(scale[r]), float4(bias[r]));
      }
      const uint column = at * (32 / Bits) + 4 * part;
#pragma unroll
      for (int t = 0; t < M; ++t) {
        if (M > 1 && from[t] == ABSENT) continue;
        const auto v = *reinterpret_cast<const device vec<T, 4>*>(x + from[t] + column);
        const float4 f = factor[t] * float4(float(v.x), float(v.y), float(v.z), float(v.w));
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float half_sum = fma(q[r].y, f.y, fma(q[r].x, f.x, sums[t][r]));
          sums[t][r] = fma(q[r].w, f.w, fma(q[r].z, f.z, half_sum));
        }
      }
    }
  }
}

// Two neighbouring elements of one expert's h for M tokens: token t's x starts at from[t], its h at
// to[t].
template <int Bits, int Group, int Words, int Columns, int Inner, int M, typename T, typename S>
inline void two_elements(const device uint* weight, const device S* scales, const device S* biases,
                         uint row, const device T* x, thread const uint (&from)[M], device T* h,
                         thread const uint (&to)[M], uint lane) {
  const uint rows[4] = {row, row + 1, row + Inner, row + Inner + 1};
  float sums[M][4] = {};
  float ones[M];
#pragma unroll
  for (int t = 0; t < M; ++t) ones[t] = 1.0f;
  add_products<Bits, Group, Words, Columns>(weight, scales, biases, rows, x, from, ones, lane,
                                            sums);
#pragma unroll
  for (int t = 0; t < M; ++t) {
    if (M > 1 && from[t] == ABSENT) continue;
    const float2 gate = float2(simd_sum(sums[t][0]), simd_sum(sums[t][1]));
    const float2 up = float2(simd_sum(sums[t][2]), simd_sum(sums[t][3]));
    const float2 both = gate / (1.0f + exp(-gate)) * up;
    if (lane < 2) h[to[t] + row + lane] = T(lane == 0 ? both.x : both.y);
  }
}

// body
  const uint lane = thread_index_in_simdgroup;
  const uint row =
      2 * (threadgroup_position_in_grid.y * Simdgroups + simdgroup_index_in_threadgroup);
  uint from[N], to[N];

  if (threadgroup_position_in_grid.z == 0) {
    if (row >= uint(Shared)) return;
#pragma unroll
    for (int t = 0; t < N; ++t) {
      from[t] = t * Hidden;
      to[t] = t * (K * Inner + Shared) + K * Inner;
    }
    two_elements<SharedBits, SharedGroup, SharedWords, Hidden, Shared>(
        shared_weight, shared_scales, shared_biases, row, x, from, h, to, lane);
    return;
  }

  if (row >= uint(Inner)) return;
  const uint pair = threadgroup_position_in_grid.z - 1;
  const uint token = pair / K;
  const uint expert = experts[pair];
  int tokens = 0;
#pragma unroll
  for (int t = 0; t < N; ++t) {
    // Lane k looks at the token's k-th expert; all lanes of all simdgroups decide alike.
    const bool same = lane < uint(K) && experts[t * K + min(lane, uint(K - 1))] == expert;
    const uint found = uint(simd_vote::vote_t(simd_ballot(same)));
    if (found != 0 && uint(t) < token) return;
    from[t] = found != 0 ? t * Hidden : ABSENT;
    to[t] = t * (K * Inner + Shared) + ctz(found) * Inner;
    tokens += found != 0;
  }

  const size_t first = size_t(expert) * (2 * Inner);
  const auto matrix = weight + first * (Hidden * Bits / 32);
  const auto matrix_scales = scales + first * (Hidden / Group);
  const auto matrix_biases = biases + first * (Hidden / Group);
  if (tokens == 1) {
    const uint one_from[1] = {token * Hidden};
    const uint one_to[1] = {token * (K * Inner + Shared) + pair % K * Inner};
    two_elements<Bits, Group, Words, Hidden, Inner>(
        matrix, matrix_scales, matrix_biases, row, x, one_from, h, one_to, lane);
  } else {
    two_elements<Bits, Group, Words, Hidden, Inner>(
        matrix, matrix_scales, matrix_biases, row, x, from, h, to, lane);
  }
