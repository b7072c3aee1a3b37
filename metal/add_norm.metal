// equation: sum = x + y, rounded to x's type; normed = sum / sqrt(mean(sum^2) + eps) * weight,
//           from the rounded sum, rounded once
// shapes:   x, y, sum, normed [rows, Hidden]; weight [Hidden]; eps scalar
// types:    x, y, sum, normed T (float, half, bfloat); weight, eps float; arithmetic in float
// template: T; Hidden; Threads, a multiple of 32; Width, elements side by side that one thread
//           reads, a divisor of Hidden; Steps, how often: Threads * Width * Steps >= Hidden
// grid:     (Threads, rows), threadgroup (Threads, 1): one per row
// needs:    8 * Steps floats per thread in registers, Threads / 8 bytes of threadgroup memory,
//           one barrier, two simd_sum
// traffic:  per row x and y read once, sum and normed written once; weight read once per row
// checked:  executed on the CPU only

// body
  threadgroup float partial[Threads / 32];
  const uint lane = thread_index_in_simdgroup;
  const uint me = thread_position_in_threadgroup.x;
  const size_t row = size_t(thread_position_in_grid.y) * Hidden;

  // Everything is asked of memory before the barrier, the weights too.
  float values[Steps * Width];
  float factors[Steps * Width];
  float squares = 0;
  for (int step = 0; step < Steps; ++step) {
    const uint first = (step * Threads + me) * Width;
    if (first < uint(Hidden)) {
      for (int i = 0; i < Width; ++i) {
        const T rounded = T(float(x[row + first + i]) + float(y[row + first + i]));
        const float value = float(rounded);
        sum[row + first + i] = rounded;
        values[step * Width + i] = value;
        factors[step * Width + i] = weight[first + i];
        squares += value * value;
      }
    }
  }

  squares = simd_sum(squares);
  if (Threads > 32) {
    if (lane == 0) partial[simdgroup_index_in_threadgroup] = squares;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    squares = simd_sum(lane < uint(Threads / 32) ? partial[lane] : 0.0f);
  }
  const float scale = metal::precise::rsqrt(squares / Hidden + eps);

  for (int step = 0; step < Steps; ++step) {
    const uint first = (step * Threads + me) * Width;
    if (first < uint(Hidden)) {
      for (int i = 0; i < Width; ++i) {
        const int at = step * Width + i;
        normed[row + first + i] = T(values[at] * scale * factors[at]);
      }
    }
  }
