// equation: y[i] = scale * q + bias of the packed row that ids[i] names; an id outside counts as
//           the last
// shapes:   ids [rows]; weight [V, Hidden * Bits / 32], scales, biases [V, Hidden / Group];
//           y [rows, Hidden]
// types:    ids uint or int; weight uint; scales, biases any float; y T (float, half, bfloat);
//           arithmetic in float, one rounding
// template: T; Hidden; Bits (2, 3, 4, 5, 6, 8); Group, a multiple of 8
// grid:     (Hidden / 8, rows), any threadgroup: a thread unpacks eight values
// needs:    8 floats per thread in registers; no threadgroup memory, no barrier
// traffic:  of each row that is named the packed values, scales and biases, once per id; y written
//           once
// checked:  executed on the CPU only

// body
  const uint first = thread_position_in_grid.x * 8;
  const size_t at = thread_position_in_grid.y;
  const uint named = uint(ids[at]);
  const uint last = weight_shape[0] - 1;
  const size_t row = named < last ? named : last;

  // A row is one stream of bits, low bits first. Eight values are Bits bytes, and these lie in at
  // most two words: neighbouring threads read neighbouring words, whatever Bits is.
  const uint bit = first * Bits;
  const size_t word = row * (Hidden * Bits / 32) + bit / 32;
  const size_t group = row * (Hidden / Group) + first / Group;
  const float scale = float(scales[group]);
  const float bias = float(biases[group]);
  ulong packed = weight[word];
  // Not past the row: behind the last one nothing may be read.
  if (bit % 32 + 8 * Bits > 32) packed |= ulong(weight[word + 1]) << 32;
  packed >>= bit % 32;

  for (int i = 0; i < 8; ++i) {
    const uint q = uint(packed >> (i * Bits)) & ((1u << Bits) - 1);
    y[at * Hidden + first + i] = T(fma(scale, float(q), bias));
  }
