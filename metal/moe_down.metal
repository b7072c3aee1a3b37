// equation: y = sum over a token's experts of weight * (D h) + shared * (D' h'), D the expert's
//           matrix, D' that of the shared expert; both plain, or packed: w = scale * q + bias, one
//           of these per Group columns
// shapes:   h [N, K Inner + Shared]; experts, weights [N, K], the experts of one token distinct;
//           shared [N]; weight [E, Hidden, Inner] or packed words in its place, scales and biases
//           [E, Hidden, Inner / Group]; shared_* the same without E, of Shared columns;
//           y [N, Hidden]
// types:    h, y T (float, half, bfloat); experts uint; weights, shared float; weight uint if
//           packed, else any float; scales, biases any float, of plain matrices not read;
//           arithmetic in float, one rounding
// template: T; N 1 to 8; K up to 32; Hidden, a multiple of Rows; Inner, Shared; Rows; Simdgroups;
//           Bits (4, 8; of plain elements 16, 32), Group, Words (4, 2, 1: of 32 bits, that a lane
//           loads at once) and for the shared expert SharedBits, SharedGroup, SharedWords
// grid:     (32, Simdgroups, Hidden / Rows), threadgroup (32, Simdgroups, 1): one for Rows elements
//           of y of every token; its simdgroups take turns at the shared expert and the pairs of
//           token and expert; a pair is left to the first one with the same expert
// needs:    N * Rows sums and Rows * Words words per thread in registers, 4 * Simdgroups * N *
//           Rows bytes of threadgroup memory, one barrier
// traffic:  the rows of each expert that was chosen, once; h from the cache for every Rows
// checked:  executed on the CPU only
// with:     loads products

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
      const auto matrix = matrix_at<SharedBits, SharedGroup, SharedWords, Shared>(
          shared_weight, shared_scales, shared_biases, 0);
      add_products(matrix, rows, h, from, factor, lane, sums);
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

    const auto matrix = matrix_at<Bits, Group, Words, Inner>(weight, scales, biases,
                                                             size_t(expert) * Hidden);
    if (tokens == 1) {
      const uint one_from[1] = {token * width + pair % K * Inner};
      const float one_factor[1] = {weights[pair]};
      float one_sums[1][Rows] = {};
      add_products(matrix, rows, h, one_from, one_factor, lane, one_sums);
#pragma unroll
      for (int t = 0; t < N; ++t)
#pragma unroll
        for (int r = 0; r < Rows; ++r)
          sums[t][r] += uint(t) == token ? one_sums[0][r] : 0.0f;
    } else {
      add_products(matrix, rows, h, from, factor, lane, sums);
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
