// Everything between the projections of Gated DeltaNet and its recurrence, for any number of tokens.
//
// equation: u_t = silu(sum_j weight_j x_(t - taps + 1 + j)) per channel, x = [conv, qkv]
//           q = Dk^-0.5 u / sqrt(sum u^2 + 1e-6), k = u / sqrt(sum u^2 + 1e-6), v = u, per head
//           beta = sigmoid(b), log_g = -exp(A_log) softplus(a + dt_bias); all zero from lengths on
// shapes:   qkvz [B, T, WIDTH] as q | k | v | z; ba [B, T, 2 HV] as b | a; conv [B, TAPS - 1, CHANNELS]
//           conv_weight [TAPS, CHANNELS]; A_log, dt_bias [HV]; lengths [B] or [1]
//           q, k [B, T, HK, DK]; v [B, T, HV, DV]; log_g, beta [B, T, HV]; next_conv as conv
//           CHANNELS = 2 HK DK + HV DV, WIDTH = CHANNELS + HV DV
// types:    qkvz, conv, next_conv X = float, half or bfloat; weights and ba any float type each
//           lengths int; all other outputs float
// template: X, HK, HV, DK, DV <= 256, TAPS >= 2, RUN (tokens of one simdgroup)
// grid:     32 x (2 HK + HV heads, 1 for the gates) x (B ceil(T / RUN)); threadgroups of 32 x 8 x 1
// needs:    no threadgroup memory, no barriers; 12 N + 20 registers, N = max(DK, DV) / 32
// traffic:  q | k | v once, and TAPS - 1 tokens again per run; the weights once per run; outputs once
// checked:  executed on the CPU only

inline float silu_f32(float x) {
  return x / (1.0f + exp(-x));
}

// Tokens [start, stop) of one head. The convolution's window slides through registers, so that each
// input is fetched once; lanes hold neighbouring channels.
template <typename X, int D, int TAPS, int RUN, int WIDTH, int CHANNELS, typename In, typename Past,
          typename Weight, typename Out, typename Next>
inline void convolve_run(In x, Past past, Weight weight, Out out, Next next, int start, int stop,
                         int count, int stride, float scale, int lane) {
  constexpr int N = (D + 31) / 32;
  float taps[TAPS][N], window[TAPS][N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int c = lane + 32 * i;
    for (int j = 0; j < TAPS; ++j) {
      const int t = start - TAPS + j;
      taps[j][i] = c < D ? float(weight[j * CHANNELS + c]) : 0.0f;
      window[j][i] = 0.0f;
      if (c < D && j > 0 && t < count) {
        window[j][i] = t < 0 ? float(past[(t + TAPS - 1) * CHANNELS + c])
                             : float(x[size_t(t) * WIDTH + c]);
      }
    }
  }
  for (int t = start; t < min(stop, count); ++t) {
    float u[N];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = lane + 32 * i;
      for (int j = 0; j + 1 < TAPS; ++j) {
        window[j][i] = window[j + 1][i];
      }
      window[TAPS - 1][i] = c < D ? float(x[size_t(t) * WIDTH + c]) : 0.0f;
      float sum = 0.0f;
      for (int j = 0; j < TAPS; ++j) {
        sum = fma(taps[j][i], window[j][i], sum);
      }
      u[i] = silu_f32(sum);
      squares = fma(u[i], u[i], squares);
    }
    const float factor = scale > 0.0f ? scale * rsqrt(simd_sum(squares) + 1e-6f) : 1.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = lane + 32 * i;
      if (c < D) {
        out[size_t(t) * stride + c] = factor * u[i];
      }
    }
  }
  for (int t = max(start, count); t < stop; ++t) {
    for (int c = lane; c < D; c += 32) {
      out[size_t(t) * stride + c] = 0.0f;
    }
  }
  // The run that holds the last token that counts still has its window.
  const int last = max(count - 1, 0);
  if (start <= last && last < start + RUN) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = lane + 32 * i;
      for (int j = 1; j < TAPS && c < D; ++j) {
        next[(j - 1) * CHANNELS + c] = X(window[j][i]);
      }
    }
  }
}

// body
constexpr int KEYS = HK * DK;
constexpr int CHANNELS = 2 * KEYS + HV * DV;
constexpr int WIDTH = CHANNELS + HV * DV;
const int lane = thread_index_in_simdgroup;
const int head = thread_position_in_grid.y;
const int tokens = qkvz_shape[1];
const int runs = (tokens + RUN - 1) / RUN;
const int b = thread_position_in_grid.z / runs;
const int start = (thread_position_in_grid.z % runs) * RUN;
const int stop = min(start + RUN, tokens);
const int count = clamp(int(lengths[min(b, int(lengths_shape[0]) - 1)]), 0, tokens);
const size_t first = size_t(b) * tokens;

if (head == 2 * HK + HV) {
  for (int i = start * HV + lane; i < stop * HV; i += 32) {
    const int t = i / HV;
    const int h = i % HV;
    float decay = 0.0f;
    float strength = 0.0f;
    if (t < count) {
      const float a = float(ba[(first + t) * (2 * HV) + HV + h]) + float(dt_bias[h]);
      const float softplus = max(a, 0.0f) + log1p(exp(-abs(a)));
      decay = -exp(float(A_log[h])) * softplus;
      strength = 1.0f / (1.0f + exp(-float(ba[(first + t) * (2 * HV) + h])));
    }
    log_g[first * HV + i] = decay;
    beta[first * HV + i] = strength;
  }
} else {
  const bool is_key = head < 2 * HK;
  const int h = is_key ? head % HK : head - 2 * HK;
  // q and k heads lie one after the other.
  const int channel = is_key ? head * DK : 2 * KEYS + h * DV;
  const auto x = qkvz + first * WIDTH + channel;
  const auto past = conv + size_t(b) * (TAPS - 1) * CHANNELS + channel;
  const auto weight = conv_weight + channel;
  const auto next = next_conv + size_t(b) * (TAPS - 1) * CHANNELS + channel;
  if (is_key) {
    const float scale = head < HK ? rsqrt(float(DK)) : 1.0f;
    const auto out = (head < HK ? q : k) + (first * HK + h) * DK;
    convolve_run<X, DK, TAPS, RUN, WIDTH, CHANNELS>(
        x, past, weight, out, next, start, stop, count, HK * DK, scale, lane);
  } else {
    const auto out = v + (first * HV + h) * DV;
    convolve_run<X, DV, TAPS, RUN, WIDTH, CHANNELS>(
        x, past, weight, out, next, start, stop, count, HV * DV, 0.0f, lane);
  }
}
