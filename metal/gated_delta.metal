// The gated delta rule over many tokens, in chunks of 16.
//
// equation: S <- exp(log_g_t) S;  S <- S + k_t (beta_t (v_t - S^T k_t))^T;  o_t = S^T q_t.
//           Per chunk, with D_ij = exp(log_g_j+1 + ... + log_g_i), e_i = D_i,-1 and the rows of
//           K, Q, V: N = -strictly lower(beta K K^T o D), F = (I - N)^-1 beta (V - e K S),
//           O = e Q S + lower(Q K^T o D) F,  S <- e_15 S + K^T (D_15 F).
// shapes:   q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], log_g, beta [B, T, Hv], state [B, Hv, Dk, Dv],
//           lengths [B] (or [1], not read) -> o [B, T, Hv, Dv], last [B, Hv, Dk, Dv].
//           Value head h reads key head h / (Hv / Hk). Beyond a row's length o is 0, S stays.
// types:    q, k, v, o are In (float, half, bfloat); log_g, beta, state, last f32; lengths int32.
//           All sums and exponents f32; o is rounded once.
// template: In; Dk; Dv; SG simdgroups per threadgroup, 8 columns of S each; RAGGED lengths count.
// grid:     (32 SG) (Dv / 8 SG) x Hv x B threads, 32 SG to a threadgroup.
// needs:    Dk a multiple of 16, Dv of 8 SG, log_g <= 0 (-inf is fine); q, k, v of one type.
//           SG = 8, Dk = 128: 24.5 KiB of threadgroup memory in f32, 16 KiB in half and bfloat.
// traffic:  S stays in registers, 2 Dk / 8 floats per lane. Of v, state, o and last every byte once,
//           in whole lines if 8 SG values fill one; q and k (Hv / Hk) (Dv / 8 SG) times in all,
//           gates Dv / 8 SG times, each from a line of its own. Per chunk 3 barriers and
//           SG (6 Dk / 8 + 6) + 6 Dk / 8 + 8 products of 8 x 8 matrices: 920 for 64 columns.
// checked:  executed on the CPU only.

// The six 8 x 8 blocks on and below the diagonal of K K^T and Q K^T, dealt to the simdgroups in this
// order: of four, the two that get one block only have to invert it.
constant ushort OF_Q[6] = {0, 1, 0, 0, 1, 1};
constant ushort ROW[6] = {1, 0, 0, 1, 1, 1};
constant ushort COLUMN[6] = {0, 0, 0, 1, 0, 1};

// A lane holds the elements (at.y, at.x) and (at.y, at.x + 1) of a tile.
// Strides and places are even, so that the two can travel together.
template <typename T>
inline void load(
    thread simdgroup_float8x8& m, const threadgroup T* from, int stride, ushort2 at) {
  const metal::vec<T, 2> two =
      *(const threadgroup metal::vec<T, 2>*)(from + at.y * stride + at.x);
  m.thread_elements()[0] = float(two[0]);
  m.thread_elements()[1] = float(two[1]);
}

template <typename T>
inline void load_transposed(
    thread simdgroup_float8x8& m, const threadgroup T* from, int stride, ushort2 at) {
  m.thread_elements()[0] = float(from[at.x * stride + at.y]);
  m.thread_elements()[1] = float(from[(at.x + 1) * stride + at.y]);
}

inline void store(simdgroup_float8x8 m, threadgroup float* to, int stride, ushort2 at) {
  *(threadgroup float2*)(to + at.y * stride + at.x) =
      float2(m.thread_elements()[0], m.thread_elements()[1]);
}

inline void scale(thread simdgroup_float8x8& m, float by) {
  m.thread_elements()[0] *= by;
  m.thread_elements()[1] *= by;
}

// Rows of WIDTH elements by THREADS threads, 4 elements each and EACH times; zeros from `rows` on.
template <int THREADS, int WIDTH, int EACH, typename T>
inline void fetch(
    thread metal::vec<T, 4>* to, const device T* from, int stride, int rows, int thread_index) {
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int e = thread_index + n * THREADS, row = e / (WIDTH / 4);
    to[n] = metal::vec<T, 4>(T(0));
    if (row < rows) {
      to[n] = *(const device metal::vec<T, 4>*)(from + row * stride + e % (WIDTH / 4) * 4);
    }
  }
}

// What `fetch` fetched, into 16 rows of threadgroup memory; stride and positions in fours.
template <int THREADS, int WIDTH, int EACH, typename P, typename Q>
inline void put(P to, int stride, Q from, int thread_index) {
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int e = thread_index + n * THREADS, row = e / (WIDTH / 4);
    if (row < 16) to[row * stride + e % (WIDTH / 4)] = from[n];
  }
}

// Sums of log_g over the 1, 2, 4, 8 and 16 tokens up to this lane's. Sums of windows, because a
// difference of running sums would lose its digits behind one large decay.
struct Windows {
  float one, two, four, eight, all;
};

inline Windows windows(float x, ushort lane) {
  Windows w;  // lanes 16 to 31 hold zeros, which is what lies before token 0
  w.one = x;
  w.two = w.one + simd_shuffle(w.one, ushort((lane + 31) % 32));
  w.four = w.two + simd_shuffle(w.two, ushort((lane + 30) % 32));
  w.eight = w.four + simd_shuffle(w.four, ushort((lane + 28) % 32));
  w.all = w.eight + simd_shuffle(w.eight, ushort((lane + 24) % 32));
  return w;
}

// exp of the sum over the `count` < 16 tokens up to token `last`.
inline float decay(Windows w, int last, int count) {
  float sum = 0;
  float part = simd_shuffle(w.one, ushort(last & 31));
  sum += count & 1 ? part : 0;
  last -= count & 1;
  part = simd_shuffle(w.two, ushort(last & 31));
  sum += count & 2 ? part : 0;
  last -= count & 2;
  part = simd_shuffle(w.four, ushort(last & 31));
  sum += count & 4 ? part : 0;
  last -= count & 4;
  part = simd_shuffle(w.eight, ushort(last & 31));
  sum += count & 8 ? part : 0;
  return metal::precise::exp(sum);
}

// exp(x) = r.x + r.y. Near 1 the difference to 1 is kept: every chunk would repeat the rounding of
// exp(x) itself, and over thousands of tokens it would show.
inline float2 split_exp(float x) {
  if (x < -0.25f) return float2(0, metal::precise::exp(x));
  const float tail = x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)));
  return float2(1, x * (1 + x / 2 * (1 + x / 3 * (1 + tail))));
}

// N <- (I - N)^-1 for N strictly lower: (I + N)(I + N^2)(I + N^4).
inline void invert(thread simdgroup_float8x8& N, ushort2 at) {
  simdgroup_float8x8 power, sum = N, next;
  sum.thread_elements()[0] += at.x == at.y ? 1 : 0;
  sum.thread_elements()[1] += at.x + 1 == at.y ? 1 : 0;
  simdgroup_multiply(power, N, N);
  simdgroup_multiply_accumulate(next, sum, power, sum);
  simdgroup_multiply(sum, power, power);
  simdgroup_multiply_accumulate(N, next, sum, next);
}

// K S in read[0..1] and Q S in read[2..3] (8 tokens each, the columns of S), and in job[n] the block
// sg + n SG of K K^T or Q K^T: independent sums, so that products need not wait.
template <int Dk, int LD, int SG, int JOBS, typename T>
inline void multiply(
    thread simdgroup_float8x8* read, thread simdgroup_float8x8* job,
    const thread simdgroup_float8x8* S, const threadgroup T* keys, const threadgroup T* queries,
    int sg, ushort2 at) {
  simdgroup_float8x8 tile, key_column;
  for (int n = 0; n < 4; ++n) read[n] = simdgroup_float8x8(0.0f);
  for (int n = 0; n < JOBS; ++n) job[n] = simdgroup_float8x8(0.0f);
#pragma unroll
  for (int d = 0; d < Dk; d += 8) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      load(tile, (n < 2 ? keys : queries) + n % 2 * 8 * LD + d, LD, at);
      simdgroup_multiply_accumulate(read[n], tile, S[d / 8], read[n]);
    }
#pragma unroll
    for (int n = 0; n < JOBS; ++n) {
      const int j = sg + n * SG;
      if (j < 6) {
        load(tile, (OF_Q[j] ? queries : keys) + ROW[j] * 8 * LD + d, LD, at);
        load_transposed(key_column, keys + COLUMN[j] * 8 * LD + d, LD, at);
        simdgroup_multiply_accumulate(job[n], tile, key_column, job[n]);
      }
    }
  }
}

// Block j of K K^T or Q K^T with its decays and strengths; on K's diagonal, the inverse.
inline void finish(
    thread simdgroup_float8x8& m, int j, Windows w, const threadgroup float* beta, ushort2 at) {
  const int row = 8 * ROW[j] + at.y, ahead = row - 8 * COLUMN[j] - at.x;  // of the column
  const float factor = OF_Q[j] ? 1 : -beta[row];
  const float first = factor * decay(w, row, ahead), second = factor * decay(w, row, ahead - 1);
  m.thread_elements()[0] *= ahead + OF_Q[j] > 0 ? first : 0;
  m.thread_elements()[1] *= ahead - 1 + OF_Q[j] > 0 ? second : 0;
  if (!OF_Q[j] && ROW[j] == COLUMN[j]) invert(m, at);
}

// value <- beta (value - grown read)
inline void correct(
    thread simdgroup_float8x8& value, simdgroup_float8x8 read, float grown, float beta) {
  for (int i = 0; i < 2; ++i) {
    const float fresh = value.thread_elements()[i] - grown * read.thread_elements()[i];
    value.thread_elements()[i] = beta * fresh;
  }
}

// S <- exp(x) S + update, with exp(x) as `split_exp` gives it
inline void change(thread simdgroup_float8x8& S, float2 by, simdgroup_float8x8 update) {
  for (int i = 0; i < 2; ++i) {
    const float old = S.thread_elements()[i];
    S.thread_elements()[i] =
        metal::fma(by.x, old, metal::fma(by.y, old, update.thread_elements()[i]));
  }
}

// body
constexpr int C = 16, COLUMNS = 8 * SG, THREADS = 32 * SG, JOBS = (6 + SG - 1) / SG;
constexpr int EACH = (C * Dk / 4 + THREADS - 1) / THREADS;
// Eight (four) more per row, so that the rows of a tile lie in different banks.
constexpr int LD = Dk + 8, VLD = COLUMNS + 4;
threadgroup metal::vec<In, 4> k_fours[C * LD / 4], q_fours[C * LD / 4];
threadgroup float4 v_fours[C * VLD / 4];
threadgroup float blocks[6 * 64];
threadgroup float gates[2 * C];
const threadgroup In* keys = (const threadgroup In*)k_fours;
const threadgroup In* queries = (const threadgroup In*)q_fours;
const int me = thread_index_in_threadgroup;
const ushort lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
const ushort2 at = ushort2((lane / 4 & 2) * 2 + lane % 2 * 2, (lane / 4 & 4) + lane / 2 % 4);
threadgroup float* own = (threadgroup float*)v_fours + 8 * sg;

const int T = v_shape[1], Hv = v_shape[2], Hk = k_shape[2];
const int b = threadgroup_position_in_grid.z, h = threadgroup_position_in_grid.y;
const int column = threadgroup_position_in_grid.x * COLUMNS;
const int length = RAGGED ? metal::clamp(int(lengths[b]), 0, T) : T;
const size_t key_start = (size_t(b) * T * Hk + h / (Hv / Hk)) * Dk;
const size_t value_start = (size_t(b) * T * Hv + h) * Dv + column;
const size_t state_start = (size_t(b) * Hv + h) * Dk * Dv + column;
const device In* q_from = q + key_start;
const device In* k_from = k + key_start;
const device In* v_from = v + value_start;
const auto gate_from = (me < C ? log_g : beta) + (size_t(b) * T + me % C) * Hv + h;
// Rows of values, outputs and state are taken in fours: this thread's four and their row.
const int my_row = me / (2 * SG), my_four = me % (2 * SG);
auto o_to = (device metal::vec<In, 4>*)(o + value_start + size_t(my_row) * Hv * Dv) + my_four;
threadgroup float4* mine = v_fours + my_row * (VLD / 4) + my_four;

float4 state_rows[Dk / C];
fetch<THREADS, COLUMNS, Dk / C>(state_rows, state + state_start, Dv, Dk, me);
simdgroup_float8x8 S[Dk / 8];
#pragma unroll
for (int r = 0; r < Dk / C; ++r) {
  *mine = state_rows[r];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load(S[2 * r], own, VLD, at);
  load(S[2 * r + 1], own + 8 * VLD, VLD, at);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

metal::vec<In, 4> next_k[EACH], next_q[EACH], next_v[1];
float next_gate = 0;
int t = -C;  // the round of -C only fetches
for (; t < length; t += C) {
  if (t >= 0) {
    put<THREADS, Dk, EACH>(k_fours, LD / 4, next_k, me);
    put<THREADS, Dk, EACH>(q_fours, LD / 4, next_q, me);
    *mine = float4(next_v[0]);
    if (me < 2 * C) gates[me] = next_gate;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  // The next chunk travels while this one is computed.
  const int left = length - t - C;
  const size_t next = t + C;
  fetch<THREADS, Dk, EACH>(next_k, k_from + next * Hk * Dk, Hk * Dk, left, me);
  fetch<THREADS, Dk, EACH>(next_q, q_from + next * Hk * Dk, Hk * Dk, left, me);
  fetch<THREADS, COLUMNS, 1>(next_v, v_from + next * Hv * Dv, Hv * Dv, left, me);
  next_gate = me < 2 * C && me % C < left ? gate_from[next * Hv] : 0;
  if (t < 0) continue;

  simdgroup_float8x8 read[4], job[JOBS], F[2], tile, other;
  multiply<Dk, LD, SG, JOBS>(read, job, S, keys, queries, sg, at);
  const Windows sums = windows(lane < C ? gates[lane] : 0, lane);
#pragma unroll
  for (int n = 0; n < JOBS; ++n) {
    if (sg + n * SG < 6) {
      finish(job[n], sg + n * SG, sums, gates + C, at);
      store(job[n], blocks + 64 * (sg + n * SG), 8, at);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int row = 8 * n + at.y;
    const float grown = metal::precise::exp(simd_shuffle(sums.all, ushort(row)));
    load(tile, own + 8 * n * VLD, VLD, at);
    correct(tile, read[n], grown, gates[C + row]);
    if (n == 1) {
      load(other, blocks + 64 * 0, 8, at);
      simdgroup_multiply_accumulate(tile, other, F[0], tile);
    }
    load(other, blocks + 64 * (2 + n), 8, at);
    simdgroup_multiply(F[n], other, tile);
    scale(read[2 + n], grown);
    load(other, blocks + 64 * (1 + 3 * n), 8, at);
    simdgroup_multiply_accumulate(read[2 + n], other, F[0], read[2 + n]);
  }
  load(other, blocks + 64 * 5, 8, at);
  simdgroup_multiply_accumulate(read[3], other, F[1], read[3]);
  store(read[2], own, VLD, at);
  store(read[3], own + 8 * VLD, VLD, at);

  for (int n = 0; n < 2; ++n) scale(F[n], decay(sums, 15, 15 - 8 * n - at.y));
  const float2 all = split_exp(simd_shuffle(sums.all, ushort(15)));
#pragma unroll
  for (int d = 0; d < Dk; d += 8) {
    load_transposed(tile, keys + d, LD, at);
    simdgroup_multiply(other, tile, F[0]);
    load_transposed(tile, keys + 8 * LD + d, LD, at);
    simdgroup_multiply_accumulate(other, tile, F[1], other);
    change(S[d / 8], all, other);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t + my_row < T) o_to[size_t(t) * Hv * Dv / 4] = metal::vec<In, 4>(*mine);
}
for (; t + my_row < T; t += C) o_to[size_t(t) * Hv * Dv / 4] = metal::vec<In, 4>(In(0));

auto last_to = (device float4*)(last + state_start + my_row * Dv) + my_four;
#pragma unroll
for (int r = 0; r < Dk / C; ++r) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  store(S[2 * r], own, VLD, at);
  store(S[2 * r + 1], own + 8 * VLD, VLD, at);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  last_to[r * C * Dv / 4] = *mine;
}
