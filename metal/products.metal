// Products of rows of a matrix with rows of x. The matrix is packed, w = scale * q + bias
// with one scale and bias per Group columns, or plain: then Bits is that of its type, and scales
// and biases are not read. Needs loads.metal.

enum : uint { ABSENT = 0xffffffffu };

// Rows of Columns elements. Words, 32 bits each, are what a lane loads of a row at once.
template <int Bits, int Group, int Words, int Columns, typename W, typename S>
struct Matrix {
  const device uint* words;
  const device S* scales;
  const device S* biases;
};

// The matrix that begins with the row `first` of a stack.
template <int Bits, int Group, int Words, int Columns, typename W, typename S>
inline Matrix<Bits, Group, Words, Columns, W, S> matrix_at(
    const device W* weight, const device S* scales, const device S* biases, size_t first) {
  return {reinterpret_cast<const device uint*>(weight) + first * (Columns * Bits / 32),
          scales + first * (Columns / Group), biases + first * (Columns / Group)};
}

// Four of the elements that lie in a lane's words, as floats and exactly, before scale and bias.
template <typename W, int Bits>
struct Part;
template <>
struct Part<float, 32> {
  template <int Words>
  static float4 of(thread const uint (&w)[Words], int part) {
    const int at = 4 * part;
    return as_type<float4>(uint4(w[at], w[at + 1], w[at + 2], w[at + 3]));
  }
};
template <>
struct Part<half, 16> {
  template <int Words>
  static float4 of(thread const uint (&w)[Words], int part) {
    return float4(as_type<half4>(uint2(w[2 * part], w[2 * part + 1])));
  }
};
template <>
struct Part<bfloat, 16> {
  template <int Words>
  static float4 of(thread const uint (&w)[Words], int part) {
    const uint low = w[2 * part], high = w[2 * part + 1], upper = 0xffff0000u;
    return as_type<float4>(uint4(low << 16, low & upper, high << 16, high & upper));
  }
};
// A packed value's bits become the mantissa of a number between 1 and 2 and the multiply-add takes
// the 1 away: shifts and conversions take four times as long.
template <>
struct Part<uint, 4> {
  template <int Words>
  static float4 of(thread const uint (&w)[Words], int part) {
    const uint v = w[part / 2] >> (part % 2 * 16);
    const uint4 m = (uint4(v) & uint4(0xfu, 0xf0u, 0xf00u, 0xf000u)) | uint4(0x3f800000u);
    const float4 unit = float4(8388608.0f, 524288.0f, 32768.0f, 2048.0f);
    return fma(as_type<float4>(m), unit, -unit);
  }
};
template <>
struct Part<uint, 8> {
  template <int Words>
  static float4 of(thread const uint (&w)[Words], int part) {
    const uint low = w[part], high = low >> 16;
    const uint4 mask = uint4(0xffu, 0xff00u, 0xffu, 0xff00u);
    const uint4 m = (uint4(low, low, high, high) & mask) | uint4(0x3f800000u);
    const float4 unit = float4(8388608.0f, 32768.0f, 8388608.0f, 32768.0f);
    return fma(as_type<float4>(m), unit, -unit);
  }
};

// The products of R rows of a matrix with M rows of x, these times their factors, added to this
// lane's sums. Rows of x start at `from`; ABSENT ones are left out.
template <int Bits, int Group, int Words, int Columns, int M, int R, typename W, typename S,
          typename T>
inline void add_products(Matrix<Bits, Group, Words, Columns, W, S> matrix,
                         thread const uint (&rows)[R], const device T* x,
                         thread const uint (&from)[M], thread const float (&factor)[M], uint lane,
                         thread float (&sums)[M][R]) {
  constexpr bool Packed = Bits <= 8;
  constexpr uint Row = Columns * Bits / 32;
  for (uint at = lane * Words; at < Row; at += 32 * Words) {
    uint w[R][Words];
    float scale[R], bias[R];
    const uint first = at * (32 / Bits);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      fetch(matrix.words + rows[r] * Row + at, w[r]);
      if (Packed) {
        const uint group = rows[r] * (Columns / Group) + first / Group;
        scale[r] = float(matrix.scales[group]);
        bias[r] = float(matrix.biases[group]);
      }
    }
#pragma unroll
    for (int part = 0; part < Words * 8 / Bits; ++part) {
      float4 q[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        q[r] = Part<W, Bits>::of(w[r], part);
        if (Packed) q[r] = fma(q[r], float4(scale[r]), float4(bias[r]));
      }
#pragma unroll
      for (int t = 0; t < M; ++t) {
        if (M > 1 && from[t] == ABSENT) continue;
        const float4 f = factor[t] * four(x + from[t] + first + 4 * part);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float half_sum = fma(q[r].y, f.y, fma(q[r].x, f.x, sums[t][r]));
          sums[t][r] = fma(q[r].w, f.w, fma(q[r].z, f.z, half_sum));
        }
      }
    }
  }
}
