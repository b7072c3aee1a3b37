// equation: maxima[b, j] = the largest of the 128 logits from 128 j on; NaN counts as -infinity
// shapes:   logits [B, Width], of which the first `size` of a row count; size scalar;
//           maxima [B, blocks], blocks = ceil(size / 128)
// types:    logits float, half or bfloat; maxima float; size int
// template: Width
// grid:     (32 * ceil(blocks / 8), B), threadgroup (any multiple of 32, 1): a simdgroup reads
//           eight blocks, and none waits for another
// needs:    8 floats per thread in registers, eight simd_max; no threadgroup memory, no barrier
// traffic:  logits read once, 4 blocks bytes written per row
// checked:  executed on the CPU only

// body
  constexpr uint Each = 8;
  const uint count = size, blocks = (count + 127) / 128;
  const uint lane = thread_index_in_simdgroup;
  const uint start = thread_position_in_grid.x / 32 * Each;
  const size_t row = thread_position_in_grid.y;

  // All are asked of memory before the first is waited for. A comparison with NaN is false.
  float largest[Each];
  for (uint i = 0; i < Each; ++i) {
    const uint first = (start + i) * 128 + lane * 4;
    largest[i] = -INFINITY;
    if (first + 4 <= count) {
      for (uint e = 0; e < 4; ++e) {
        const float x = float(logits[row * Width + first + e]);
        largest[i] = x > largest[i] ? x : largest[i];
      }
    } else {
      for (uint at = first; at < count; ++at) {
        const float x = float(logits[row * Width + at]);
        largest[i] = x > largest[i] ? x : largest[i];
      }
    }
  }

  float mine = 0;
  for (uint i = 0; i < Each; ++i) {
    const float found = simd_max(largest[i]);
    mine = lane == i ? found : mine;
  }
  if (lane < Each && start + lane < blocks) maxima[row * blocks + start + lane] = mine;
