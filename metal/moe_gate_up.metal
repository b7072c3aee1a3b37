// equation: h = silu(G x) * (U x) for each expert that a token chose, then for the shared expert;
//           G and U are plain, or packed: w = scale * q + bias, one of these per Group columns
// shapes:   x [N, Hidden]; experts [N, K], those of one token distinct; weight [E, 2 Inner, Hidden]
//           or packed words in its place, rows of G before rows of U, scales and biases
//           [E, 2 Inner, Hidden / Group]; shared_* the same without E, of Shared rows;
//           h [N, K Inner + Shared]
// types:    x, h T (float, half, bfloat); experts uint; weight uint if packed, else any float;
//           scales, biases any float, of plain matrices not read; arithmetic in float, one rounding
// template: T; N 1 to 8; K up to 32; Hidden; Inner, Shared, both even; Simdgroups; Bits (4, 8; of
//           plain elements 16, 32), Group, Words (4, 2, 1: of 32 bits, that a lane loads at once)
//           and for the shared expert SharedBits, SharedGroup, SharedWords
// grid:     (32, Simdgroups * blocks, 1 + N K), threadgroup (32, Simdgroups, 1): z 0 is the shared
//           expert, z 1 + p that of pair p, left to the first pair with the same expert; a
//           simdgroup computes two elements of its expert's h for every token that chose it
// needs:    4 * N sums and 4 * Words words per thread in registers; no threadgroup memory, no
//           barrier
// traffic:  the rows of each expert that was chosen, once; x from the cache for every four rows
// checked:  executed on the CPU only
// with:     loads products swiglu_products

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
    const auto matrix = matrix_at<SharedBits, SharedGroup, SharedWords, Hidden>(
        shared_weight, shared_scales, shared_biases, 0);
    two_elements<Shared>(matrix, row, x, from, h, to, lane);
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

  const auto matrix = matrix_at<Bits, Group, Words, Hidden>(weight, scales, biases,
                                                            size_t(expert) * (2 * Inner));
  if (tokens == 1) {
    const uint one_from[1] = {token * Hidden};
    const uint one_to[1] = {token * (K * Inner + Shared) + pair % K * Inner};
    two_elements<Inner>(matrix, row, x, one_from, h, one_to, lane);
  } else {
    two_elements<Inner>(matrix, row, x, from, h, to, lane);
  }
