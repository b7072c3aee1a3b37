// The projections of Gated DeltaNet from one input, in one launch.
//
// equation: qkvz = A x, ba = B x; both matrices plain, or packed: w = scale * q + bias, one of these
//           per Group columns
// shapes:   x [N, Hidden]; weight [Width, Hidden] or packed words in its place, scales and biases
//           [Width, Hidden / Group]; ba_* the same of BaWidth rows; qkvz [N, Width], ba [N, BaWidth]
// types:    x, qkvz, ba T (float, half, bfloat); weights uint if packed, else any float; scales,
//           biases any float, of plain matrices not read; arithmetic in float, one rounding
// template: T; N 1 to 8; Hidden; Width, BaWidth, multiples of 4; Simdgroups; Bits (4, 8; of plain
//           elements 16, 32), Group, Words (4, 2, 1: of 32 bits, that a lane loads at once) and for
//           the second matrix BaBits, BaGroup, BaWords
// grid:     (32, Simdgroups * blocks, 1), threadgroup (32, Simdgroups, 1): a simdgroup computes four
//           elements of qkvz for every token; those behind the last of them, of ba
// needs:    4 * N sums and 4 * Words words per thread in registers; no threadgroup memory, no
//           barrier
// traffic:  both matrices once; x from the cache for every four rows
// checked:  executed on the CPU only
// with:     loads products

// Four neighbouring elements of y = W x for N tokens.
template <int Hidden, int Width, int N, typename W, typename T>
inline void four_elements(W matrix, uint row, const device T* x, device T* y, uint lane) {
  const uint rows[4] = {row, row + 1, row + 2, row + 3};
  float sums[N][4] = {};
  float ones[N];
  uint from[N];
#pragma unroll
  for (int t = 0; t < N; ++t) {
    ones[t] = 1.0f;
    from[t] = t * Hidden;
  }
  add_products(matrix, rows, x, from, ones, lane, sums);
#pragma unroll
  for (int t = 0; t < N; ++t) {
    float total[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) total[r] = simd_sum(sums[t][r]);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (lane == uint(r)) y[t * Width + row + r] = T(total[r]);
    }
  }
}

// body
  const uint lane = thread_index_in_simdgroup;
  const uint row =
      4 * (threadgroup_position_in_grid.y * Simdgroups + simdgroup_index_in_threadgroup);
  if (row < uint(Width)) {
    const auto matrix = matrix_at<Bits, Group, Words, Hidden>(weight, scales, biases, 0);
    four_elements<Hidden, Width, N>(matrix, row, x, qkvz, lane);
  } else if (row < uint(Width + BaWidth)) {
    const auto matrix =
        matrix_at<BaBits, BaGroup, BaWords, Hidden>(ba_weight, ba_scales, ba_biases, 0);
    four_elements<Hidden, BaWidth, N>(matrix, row - Width, x, ba, lane);
  }
