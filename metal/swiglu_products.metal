// Elements of h = silu(G x) * (U x) from a matrix that holds the rows of G before those of U. Needs
// products.metal.

// Two neighbouring elements of h for M tokens: token t's x starts at from[t], ABSENT if it is left
// out, its h at to[t]. Inner rows lie between a row of G and that of U. GateUp is a Matrix.
template <int Inner, int M, typename GateUp, typename T>
inline void two_elements(GateUp matrix, uint row, const device T* x, thread const uint (&from)[M],
                         device T* h, thread const uint (&to)[M], uint lane) {
  const uint rows[4] = {row, row + 1, row + Inner, row + Inner + 1};
  float sums[M][4] = {};
  float ones[M];
#pragma unroll
  for (int t = 0; t < M; ++t) ones[t] = 1.0f;
  add_products(matrix, rows, x, from, ones, lane, sums);
#pragma unroll
  for (int t = 0; t < M; ++t) {
    if (M > 1 && from[t] == ABSENT) continue;
    const float2 gate = float2(simd_sum(sums[t][0]), simd_sum(sums[t][1]));
    const float2 up = float2(simd_sum(sums[t][2]), simd_sum(sums[t][3]));
    const float2 both = gate / (1.0f + exp(-gate)) * up;
    if (lane < 2) h[to[t] + row + lane] = T(lane == 0 ? both.x : both.y);
  }
}
