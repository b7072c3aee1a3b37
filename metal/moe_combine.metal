// equation: y_n = sum over k of weights_nk * y_sorted[back_nk] + shared_n * shared_out_n
// shapes:   y_sorted [N K, Hidden]; back, weights [N, K]; shared [N]; shared_out, y [N, Hidden]
// types:    y_sorted, shared_out, y T (float, half, bfloat); back uint; weights, shared float;
//           arithmetic in float, one rounding
// template: T; K; Hidden, a multiple of 4
// grid:     (Hidden / 4, N), any threadgroup along the first: a thread computes four elements of y
// needs:    eight floats per thread in registers; no threadgroup memory, no barrier
// traffic:  y_sorted and shared_out once, y once
// checked:  executed on the CPU only
// with:     loads

// body
  const uint column = 4 * thread_position_in_grid.x;
  const uint token = thread_position_in_grid.y;
  const size_t at = size_t(token) * Hidden + column;
  float4 sum = shared[token] * four(shared_out + at);
  for (uint pair = token * K; pair < token * K + K; ++pair)
    sum = fma(float4(weights[pair]), four(y_sorted + size_t(back[pair]) * Hidden + column), sum);
  *reinterpret_cast<device vec<T, 4>*>(y + at) =
      vec<T, 4>(T(sum.x), T(sum.y), T(sum.z), T(sum.w));
