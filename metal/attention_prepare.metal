// equation: q, k = rotate(x / sqrt(mean(x^2) + eps) * weight) per head; gate and v copied.
//           rotate: (a, b) -> (a cos - b sin, b cos + a sin) of dims (i, i + Pairs), i < Pairs;
//           dims from 2 Pairs on pass. Rounded to T after the norm and at the output
// shapes:   qkv [B, tokens, 2 H D + 2 Hk D]: per query head D query then D gate rows, then keys,
//           then values; q_weight, k_weight [D]; cos, sin [B, 1, tokens, Pairs]; eps scalar;
//           q [B, H, tokens, D]; gate [B, tokens, H, D]; kv [2, B, Hk, tokens, D]
// types:    qkv, q, gate, kv T (float, half, bfloat); the rest float; arithmetic in float
// template: T; H; Hk; D; Pairs. A lane holds Each = ceil(D / 32) dims side by side, which must
//           divide D and Pairs: then a pair lies in the same register of two lanes
// grid:     (32 * (2 H + 2 Hk), tokens, B), threadgroup (any multiple of 32, 1, 1):
//           one simdgroup per D elements of qkv, and none waits for another
// needs:    4 * Each floats per thread in registers; no threadgroup memory, no barrier;
//           per head of q and k one simd_sum and Each simd_shuffle
// traffic:  qkv read once, q, gate and kv written once; per head of q and k a weight, and a
//           token's cos and sin, which stay in the cache
// checked:  executed on the CPU only

// body
  constexpr int Each = (D + 31) / 32;
  constexpr uint Reach = Pairs / Each;  // lanes that hold the first halves of the pairs
  const uint lane = thread_index_in_simdgroup;
  const uint part = thread_position_in_grid.x / 32;
  const uint t = thread_position_in_grid.y, tokens = threads_per_grid.y;
  const uint b = thread_position_in_grid.z, batch = threads_per_grid.z;
  const size_t token = size_t(b) * tokens + t;
  const uint first = lane * Each;
  const bool holds = first < uint(D);
  const bool is_query_or_gate = part < uint(2 * H);
  const bool is_query = is_query_or_gate && part % 2 == 0;
  const bool is_key = !is_query_or_gate && part < uint(2 * H + Hk);

  float values[Each];
  for (int e = 0; e < Each; ++e) {
    values[e] = holds ? float(qkv[(token * (2 * H + 2 * Hk) + part) * D + first + e]) : 0.0f;
  }

  if (is_query || is_key) {
    const bool is_second = lane >= Reach;
    const bool turns = lane < 2 * Reach;
    const uint partner = turns ? (is_second ? lane - Reach : lane + Reach) : lane;
    float weights[Each], c[Each], s[Each];
    for (int e = 0; e < Each; ++e) {
      weights[e] = holds ? (is_query ? q_weight[first + e] : k_weight[first + e]) : 0.0f;
      const size_t pair = token * Pairs + min(lane, partner) * Each + e;
      c[e] = turns ? cos[pair] : 1.0f;
      s[e] = turns ? (is_second ? sin[pair] : -sin[pair]) : 0.0f;
    }
    float squares = 0;
    for (int e = 0; e < Each; ++e) squares += values[e] * values[e];
    const float scale = metal::precise::rsqrt(simd_sum(squares) / D + eps);
    for (int e = 0; e < Each; ++e) {
      const float own = float(T(values[e] * scale * weights[e]));
      const float other = simd_shuffle(own, ushort(partner));
      values[e] = own * c[e] + other * s[e];
    }
  }

  device T* target = gate + (token * H + part / 2) * D;
  if (is_query) target = q + ((size_t(b) * H + part / 2) * tokens + t) * D;
  if (!is_query_or_gate) {
    const uint j = part - 2 * H;
    target = kv + (((size_t(j / Hk) * batch + b) * Hk + j % Hk) * tokens + t) * D;
  }
  if (holds) {
    for (int e = 0; e < Each; ++e) target[first + e] = T(values[e]);
  }
