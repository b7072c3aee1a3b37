// equation: experts = the K largest logits, descending, the lower index first where they are equal;
//           weights = softmax(logits) of these, divided by their sum; shared = sigmoid(x . gate)
// shapes:   logits [N, E]; x [N, Hidden]; gate [Hidden]; experts, weights [N, K]; shared [N]
// types:    logits any float; x T (float, half, bfloat); gate, weights, shared float; experts uint;
//           arithmetic in float
// template: T; E; K up to min(E, 32); Hidden, a multiple of 4
// grid:     (32, 2, N), threadgroup (32, 2, 1): one per token, whose first simdgroup chooses and
//           whose second computes shared
// needs:    E / 32 keys per thread in registers; no threadgroup memory, no barrier; per expert
//           chosen one simd_max and one simd_min
// traffic:  logits and x once, gate once per token
// checked:  executed on the CPU only
// with:     loads

// Orders as the float does, NaN above all, so that it is seen. 0 is below every float.
inline uint key_of(float x) {
  if (isnan(x)) return 0xffffffffu;
  const uint bits = x == 0.0f ? 0u : as_type<uint>(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline float float_of(uint key) {
  return as_type<float>(key >> 31 ? key ^ 0x80000000u : ~key);
}

// body
  const uint lane = thread_index_in_simdgroup;
  const uint token = threadgroup_position_in_grid.z;

  if (simdgroup_index_in_threadgroup == 1) {
    float sum = 0;
    for (uint i = 4 * lane; i < uint(Hidden); i += 128)
      sum += dot(four(x + size_t(token) * Hidden + i), four(gate + i));
    sum = simd_sum(sum);
    if (lane == 0) shared[token] = 1.0f / (1.0f + exp(-sum));
    return;
  }

  constexpr int Held = (E + 31) / 32;
  uint keys[Held];
#pragma unroll
  for (int i = 0; i < Held; ++i) {
    const uint expert = 32 * i + lane;
    keys[i] = expert < uint(E) ? key_of(float(logits[size_t(token) * E + expert])) : 0u;
  }

  // Lane k keeps the k-th.
  uint key = 0, expert = 0;
  for (uint k = 0; k < uint(K); ++k) {
    uint best = keys[0], held = 0;
#pragma unroll
    for (int i = 1; i < Held; ++i) {
      if (keys[i] > best) held = i;
      best = max(best, keys[i]);
    }
    const uint top = simd_max(best);
    const uint winner = simd_min(best == top ? 32 * held + lane : 0xffffffffu);
    if (lane == k) {
      key = top;
      expert = winner;
    }
#pragma unroll
    for (int i = 0; i < Held; ++i)
      if (32 * i + lane == winner) keys[i] = 0;
  }

  // The sum over all experts cancels: only the chosen ones are needed.
  const bool is_chosen = lane < uint(K);
  const float logit = float_of(key);
  const float largest = simd_broadcast_first(logit);
  const float p = is_chosen ? exp(logit - largest) : 0.0f;
  const float total = simd_sum(p);
  if (is_chosen) {
    experts[token * K + lane] = expert;
    weights[token * K + lane] = p / total;
  }
