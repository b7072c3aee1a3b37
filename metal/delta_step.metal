// Gated DeltaNet between its projections, for up to 8 tokens in one launch.
//
// equation: q, k, v, beta, g = exp(log_g) as in delta_prepare; then per value head and token
//           delta = beta (v - g S^T k);  o = g S^T q + (q . k) delta;  S = g S + k delta^T
//           y = o / sqrt(mean o^2 + eps) norm_weight silu(z)
// shapes:   qkvz [B, T, WIDTH] as q | k | v | z; ba [B, T, 2 HV] as b | a; conv [B, TAPS - 1, CHANNELS]
//           memory [B, HV, DK, DV]; conv_weight [TAPS, CHANNELS]; A_log, dt_bias [HV]
//           norm_weight [DV]; eps scalar; lengths [B] or [1]
//           y [B, T, HV DV]; next_conv as conv; next_memory as memory
//           CHANNELS = 2 HK DK + HV DV, WIDTH = CHANNELS + HV DV
// types:    qkvz, conv, y, next_conv X = float, half or bfloat; memory, next_memory, eps float
//           weights and ba any float type each; lengths int
// template: X, HK, HV, DK (multiple of 32, <= 128), DV (multiple of 16, <= 256), TAPS >= 2
// grid:     2 DV x HV x B; one threadgroup of 2 DV x 1 x 1 per head and row
// needs:    32 (2 DK + DV) + 128 bytes of threadgroup memory (12 KiB at 128, so that two groups fit a
//           core), 2 barriers; DK / 2 registers hold the state, about 40 others
// traffic:  memory once in and once out in 64-byte segments; q | k and their weights once per head
//           that shares them; nothing else twice but from the cache
// checked:  executed on the CPU only

inline float silu_f32(float x) {
  return x / (1.0f + exp(-x));
}

// exp(x) for x <= 0 in two parts, 1 and the small rest or 0 and the whole. A state times g rounded is
// off by 5e-5 after 4,096 tokens at g = 0.999; with the rest kept apart it is off by 2e-6.
inline float2 parted_exp(float x) {
  const float u = exp(x);
  return u < 0.5f ? float2(0.0f, u) : float2(1.0f, u == 1.0f ? x : (u - 1.0f) * (x / log(u)));
}

// Convolution, SiLU and (where scale > 0) l2 norm of up to 4 tokens of one head, by one simdgroup. The
// convolution's window slides through registers, one channel of a lane after the other: few registers
// are free beside the state.
template <int D, int TAPS, int WIDTH, int CHANNELS, int ROW, typename In, typename Past,
          typename Weight>
inline void convolve(In x, Past past, Weight weight, int start, int stop, float scale, int lane,
                     threadgroup float* rows) {
  float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int c = lane; c < D; c += 32) {
    float taps[TAPS], window[TAPS];
    for (int j = 0; j < TAPS; ++j) {
      const int t = start - TAPS + j;
      taps[j] = float(weight[j * CHANNELS + c]);
      window[j] = 0.0f;
      if (j > 0) {
        window[j] = t < 0 ? float(past[(t + TAPS - 1) * CHANNELS + c]) : float(x[t * WIDTH + c]);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int t = start + n;
      if (t < stop) {
        for (int j = 0; j + 1 < TAPS; ++j) {
          window[j] = window[j + 1];
        }
        window[TAPS - 1] = float(x[t * WIDTH + c]);
        float sum = 0.0f;
        for (int j = 0; j < TAPS; ++j) {
          sum = fma(taps[j], window[j], sum);
        }
        const float u = silu_f32(sum);
        rows[t * ROW + c] = u;
        squares[n] = fma(u, u, squares[n]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int t = start + n;
    if (scale > 0.0f && t < stop) {
      const float factor = scale * rsqrt(simd_sum(squares[n]) + 1e-6f);
      for (int c = lane; c < D; c += 32) {
        rows[t * ROW + c] *= factor;
      }
    }
  }
}

// body
// Products and sums are written as fma: T tokens at once are then, bit for bit, T tokens one by one,
// whatever the compiler would contract.
constexpr int KEYS = HK * DK, CHANNELS = 2 * KEYS + HV * DV, WIDTH = CHANNELS + HV * DV;
constexpr int SIMDGROUPS = DV / 16, ROW = 2 * DK + DV;
threadgroup float4 rows[8][ROW / 4];  // q | k | v of each token; its o takes the place of v
threadgroup float4 gates[8];          // g in two parts, g, beta

const int lane = thread_index_in_simdgroup;
const int group = simdgroup_index_in_threadgroup;
const int hv = threadgroup_position_in_grid.y, hk = hv / (HV / HK);
const int b = threadgroup_position_in_grid.z;
const int tokens = qkvz_shape[1];
const int count = clamp(int(lengths[min(b, int(lengths_shape[0]) - 1)]), 0, tokens);

// The state of 16 columns stays in this simdgroup's registers: 4 lanes across, 8 lanes down. It is
// asked for first, so that it arrives during the convolution.
const int across = 4 * group + lane % 4, down = lane / 4;
const size_t corner = (size_t(b) * HV + hv) * DK * (DV / 4) + down * DV + across;
const device float4* state = (const device float4*)memory + corner;
float4 S[DK / 8];
#pragma unroll
for (int i = 0; i < DK / 8; ++i) {
  S[i] = state[(i / 4 * 32 + i % 4) * (DV / 4)];
}

const auto x = qkvz + size_t(b) * tokens * WIDTH;
const auto past = conv + size_t(b) * (TAPS - 1) * CHANNELS;
// Jobs: q, k, v of the first half of the tokens and of the second.
const int each = (count + 1) / 2;
for (int job = group; job < 6; job += SIMDGROUPS) {
  const int part = job % 3, start = job / 3 * each, stop = min(start + each, count);
  const int channel = part < 2 ? part * KEYS + hk * DK : 2 * KEYS + hv * DV;
  threadgroup float* row = (threadgroup float*)rows[0] + part * DK;
  if (start < stop && part < 2) {
    const float scale = part == 0 ? rsqrt(float(DK)) : 1.0f;
    convolve<DK, TAPS, WIDTH, CHANNELS, ROW>(
        x + channel, past + channel, conv_weight + channel, start, stop, scale, lane, row);
  } else if (start < stop) {
    convolve<DV, TAPS, WIDTH, CHANNELS, ROW>(
        x + channel, past + channel, conv_weight + channel, start, stop, 0.0f, lane, row);
  }
}
if (group == SIMDGROUPS - 1 && lane < count) {
  const int at = (b * tokens + lane) * 2 * HV + hv;
  const float a = float(ba[at + HV]) + float(dt_bias[hv]);
  const float softplus = max(a, 0.0f) + log1p(exp(-abs(a)));
  const float2 parts = parted_exp(-exp(float(A_log[hv])) * softplus);
  gates[lane] = float4(parts, parts.x + parts.y, 1.0f / (1.0f + exp(-float(ba[at]))));
}
// Value heads that share q and k leave the writing of their inputs to the first of them.
const auto next = next_conv + size_t(b) * (TAPS - 1) * CHANNELS;
for (int c = 32 * group + lane + (hv % (HV / HK) == 0 ? 0 : 2 * DK); c < ROW; c += 2 * DV) {
  const int at_key = c < DK ? hk * DK : KEYS + (hk - 1) * DK;
  const int channel = c + (c < 2 * DK ? at_key : 2 * KEYS + hv * DV - 2 * DK);
  for (int j = 0; j + 1 < TAPS; ++j) {
    const int s = count - (TAPS - 1) + j;
    next[j * CHANNELS + channel] =
        s < 0 ? past[(count + j) * CHANNELS + channel] : x[s * WIDTH + channel];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int t = 0; t < count; ++t) {
  threadgroup float4* q = rows[t];
  threadgroup float4* k = q + DK / 4;
  threadgroup float4* v = k + DK / 4;
  const float4 gate = gates[t];
  const float4 value = v[across];
  simdgroup_barrier(mem_flags::mem_threadgroup);  // v is read before o overwrites it
  float4 by_k = 0.0f;
  float4 by_q = 0.0f;
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < DK / 32; ++i) {
    const float4 key = k[8 * i + down];
    const float4 query = q[8 * i + down];
    for (int j = 0; j < 4; ++j) {
      by_k = fma(float4(key[j]), S[4 * i + j], by_k);
      by_q = fma(float4(query[j]), S[4 * i + j], by_q);
      dot = fma(key[j], query[j], dot);
    }
  }
  for (int distance = 4; distance < 32; distance *= 2) {
    by_k += simd_shuffle_xor(by_k, distance);
    by_q += simd_shuffle_xor(by_q, distance);
    dot += simd_shuffle_xor(dot, distance);
  }
  const float4 delta = gate.w * fma(float4(-gate.z), by_k, value);
#pragma unroll
  for (int i = 0; i < DK / 32; ++i) {
    const float4 key = k[8 * i + down];
    for (int j = 0; j < 4; ++j) {
      const float4 rest = fma(float4(gate.y), S[4 * i + j], key[j] * delta);
      S[4 * i + j] = fma(float4(gate.x), S[4 * i + j], rest);
    }
  }
  if (down == 0) {
    v[across] = fma(float4(dot), delta, gate.z * by_q);
  }
}
device float4* next_state = (device float4*)next_memory + corner;
#pragma unroll
for (int i = 0; i < DK / 8; ++i) {
  next_state[(i / 4 * 32 + i % 4) * (DV / 4)] = S[i];
}
threadgroup_barrier(mem_flags::mem_threadgroup);

for (int t = group; t < tokens; t += SIMDGROUPS) {
  const threadgroup float* o = (const threadgroup float*)rows[t] + 2 * DK;
  const auto z = x + t * WIDTH + CHANNELS + hv * DV;
  const auto out = y + ((size_t(b) * tokens + t) * HV + hv) * DV;
  float squares = 0.0f;
  for (int c = lane; c < DV && t < count; c += 32) {
    squares = fma(o[c], o[c], squares);
  }
  const float factor = rsqrt(fma(simd_sum(squares), 1.0f / DV, eps));
  for (int c = lane; c < DV; c += 32) {
    out[c] = X(t < count ? o[c] * factor * float(norm_weight[c]) * silu_f32(float(z[c])) : 0.0f);
  }
}
