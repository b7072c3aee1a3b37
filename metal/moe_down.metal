// equation: y = sum over a token's experts of weight * (D h) + shared * (D' h'), D the expert's
//           matrix, D' that of the shared expert; both packed: w = scale * q + bias, one scale and
//           bias per Group columns
// shapes:   h [N, K Inner + Shared]; experts, weights [N, K], the experts of one token distinct;
//           shared [N]; weight [E, Hidden, words], scales and biases [E, Hidden, Inner / Group];
//           shared_* the same without E, of Shared columns; y [N, Hidden]
// types:    h, y T (float, half, bfloat); experts, weight uint; weights, shared float; scales and
//           biases any float; arithmetic in float, one rounding
// template: T; N 1 to 8; K up to 32; Hidden, a multiple of Rows; Inner, Shared; Rows; Simdgroups;
//           Bits (4, 8), Group, Words (4, 2, 1: packed words that a lane loads at once) and for the
//           shared expert SharedBits, SharedGroup, SharedWords
// grid:     (32, Simdgroups, Hidden / Rows), threadgroup (32, Simdgroups, 1): one for Rows elements
//           of y of every token; its simdgroups take turns at the shared expert and the pairs of
//           token and expert; a pair is left to the first one with the same expert
// needs:    N * Rows sums and Rows * Words words per thread in registers, 4 * Simdgroups * N *
//           Rows bytes of threadgroup memory, one barrier
// traffic:  the packed rows of each expert that was chosen, once; h from the cache for every Rows
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

// body
  threadgroup float partial[Simdgroups][N * Rows];
  const uint lane = thread_index_in_simdgroup;
  const uint me = simdgroup_index_in_threadgroup;
  const uint row = threadgroup_position_in_grid.z * Rows;
  const uint width = K * Inner + Shared;
  uint rows[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) rows[r] = row + r;
  float sums[N][Rows] = {};
  // Lane k knows each token's k-th expert.
  uint ids[N];
#pragma unroll
  for (int t = 0; t < N; ++t) ids[t] = experts[t * K + min(lane, uint(K - 1))];

  // Slot 0 is the shared expert, slot 1 + p the expert of pair p.
  for (uint slot = me; slot < 1 + N * K; slot += Simdgroups) {
    uint from[N];
    float factor[N];
    if (slot == 0) {
#pragma unroll
      for (int t = 0; t < N; ++t) {
        from[t] = t * width + K * Inner;
        factor[t] = shared[t];
      }
      add_products<SharedBits, SharedGroup, SharedWords, Shared>(
          shared_weight, shared_scales, shared_biases, rows, h, from, factor, lane, sums);
      continue;
    }

    const uint pair = slot - 1;
    const uint token = pair / K;
    const uint expert = experts[pair];
    int tokens = 0;
    bool earlier = false;
#pragma unroll
    for (int t = 0; t < N; ++t) {
      const uint found =
          uint(simd_vote::vote_t(simd_ballot(lane < uint(K) && ids[t] == expert)));
      const bool present = found != 0;
      const uint k = present ? ctz(found) : 0u;
      earlier = earlier || (present && uint(t) < token);
      from[t] = present ? t * width + k * Inner : ABSENT;
      factor[t] = present ? weights[t * K + k] : 0.0f;
      tokens += present;
    }
    if (earlier) continue;

    const size_t first = size_t(expert) * Hidden;
    const auto matrix = weight + first * (Inner * Bits / 32);
    const auto matrix_scales = scales + first * (Inner / Group);
    const auto matrix_biases = biases + first * (Inner / Group);
    if (tokens == 1) {
      const uint one_from[1] = {token * width + pair % K * Inner};
      const float one_factor[1] = {weights[pair]};
      float one_sums[1][Rows] = {};
      add_products<Bits, Group, Words, Inner>(matrix, matrix_scales, matrix_biases, rows, h,
                                              one_from, one_factor, lane, one_sums);
#pragma unroll
      for (int t = 0; t < N; ++t)
#pragma unroll
        for (int r = 0; r < Rows; ++r)
          sums[t][r] += uint(t) == token ? one_sums[0][r] : 0.0f;
    } else {
      add_products<Bits, Group, Words, Inner>(matrix, matrix_scales, matrix_biases, rows, h, from,
                                              factor, lane, sums);
    }
  }

#pragma unroll
  for (int t = 0; t < N; ++t)
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const float sum = simd_sum(sums[t][r]);
      if (lane == 0) partial[me][t * Rows + r] = sum;
    }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = me * 32 + lane; i < N * Rows; i += 32 * Simdgroups) {
    float sum = 0;
    for (int s = 0; s < Simdgroups; ++s) sum += partial[s][i];
    y[i / Rows * Hidden + row + i % Rows] = T(sum);
  }
