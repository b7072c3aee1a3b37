// equation: h = silu(G x) * (U x); G and U are plain, or packed: w = scale * q + bias, one of these
//           per Group columns
// shapes:   x [N, Hidden]; weight [2 Inner, Hidden] or packed words in its place, rows of G before
//           rows of U, scales and biases [2 Inner, Hidden / Group]; h [N, Inner]
// types:    x, h T (float, half, bfloat); weight uint if packed, else any float; scales, biases any
//           float, of plain matrices not read; arithmetic in float, one rounding
// template: T; N 1 to 8; Hidden; Inner, even; Simdgroups; Bits (4, 8; of plain elements 16, 32),
//           Group, Words (4, 2, 1: of 32 bits, that a lane loads at once)
// grid:     (32, Simdgroups * blocks, 1), threadgroup (32, Simdgroups, 1): a simdgroup computes two
//           elements of every token's h
// needs:    4 * N sums and 4 * Words words per thread in registers; no threadgroup memory, no
//           barrier
// traffic:  the matrix once; x from the cache for every four rows
// checked:  executed on the CPU only
// with:     loads products swiglu_products

// body
  const uint row =
      2 * (threadgroup_position_in_grid.y * Simdgroups + simdgroup_index_in_threadgroup);
  if (row >= uint(Inner)) return;
  uint from[N], to[N];
#pragma unroll
  for (int t = 0; t < N; ++t) {
    from[t] = t * Hidden;
    to[t] = t * Inner;
  }
  const auto matrix = matrix_at<Bits, Group, Words, Hidden>(weight, scales, biases, 0);
  two_elements<Inner>(matrix, row, x, from, h, to, thread_index_in_simdgroup);
