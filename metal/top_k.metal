// equation: the k largest of a row, largest first, of equals the lower index first. They lie in
//           the k blocks of 128 with the largest maxima (a block behind those has k better
//           elements before it), so these blocks are chosen, and the k are chosen among them
// shapes:   logits [B, Width], of which the first `size` of a row count; maxima [B, blocks] of
//           top_k_blocks.metal; size, k scalars, k <= 64, k <= size; values, indices [B, k]
// types:    logits float, half or bfloat; maxima, values float; indices uint; size, k int
// template: Width; Bits of the logits that are not always zero as float (32, 19 for half, 16 for
//           bfloat); Each, a power of two up to 128, and Maxima, what a thread holds of each
// grid:     (threads, B), threadgroup (threads, 1), a multiple of 32 up to 512: one per row;
//           threads * Each >= 128 * min(k, blocks), threads * Maxima >= blocks
// needs:    max(Each, Maxima) uints per thread in registers; 960 bytes of threadgroup memory; twice
//           up to Bits + 2 barriers, each with two simd_sum
// traffic:  per row maxima and 128 min(k, blocks) logits read, 8 k bytes written
// checked:  executed on the CPU only

// A larger float has a larger key. -0 has the key of 0, NaN that of -infinity; none has 0. Of the
// narrow types the low bits of the float are always zero, and are left out.
template <int Bits>
METAL_FUNC uint key_of(float x) {
  uint bits = as_type<uint>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0xff800000u;
  if (bits == 0x80000000u) bits = 0;
  return (bits & 0x80000000u ? ~bits : bits | 0x80000000u) >> (32 - Bits);
}

template <int Bits>
METAL_FUNC float value_of(uint key) {
  key <<= 32 - Bits;
  const uint bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  return as_type<float>(bits >> (32 - Bits) << (32 - Bits));
}

// Where a thread stands among the simdgroups of its threadgroup.
struct Place {
  uint lane, group, groups;
};

// Sum over a threadgroup. `scratch [groups]` is not that of the last call.
METAL_FUNC uint total(uint mine, threadgroup uint* scratch, Place me) {
  mine = simd_sum(mine);
  if (me.lane == 0) scratch[me.group] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(me.lane < me.groups ? scratch[me.lane] : 0u);
}

// Which keys are taken, and where those of this thread go.
struct Cut {
  uint key;    // all above are taken
  uint equal;  // and so many of these
  uint seen;   // of which so many came earlier
  uint place;  // of the next one that is taken
};

METAL_FUNC bool takes(thread Cut& cut, uint key) {
  const bool taken = key > cut.key || (key == cut.key && cut.seen < cut.equal);
  cut.seen += key == cut.key;
  return taken;
}

// The cut below the `wanted` largest of all threads' keys, of equals the first in the order of
// threads and then of registers. The key is found bit by bit: the largest that so many reach.
template <int Bits, int Count>
METAL_FUNC Cut cut_of(
    thread const uint* keys, uint wanted, threadgroup uint* scratch, Place me) {
  uint key = 0;
  for (int bit = Bits - 1; bit >= 0; --bit) {
    const uint trial = key | (1u << bit);
    uint mine = 0;
    for (int i = 0; i < Count; ++i) mine += keys[i] >= trial;
    const uint reached = total(mine, scratch + (bit & 1) * me.groups, me);
    if (reached >= wanted) key = trial;
    if (reached == wanted) break;
  }
  uint above = 0, equal = 0;
  for (int i = 0; i < Count; ++i) {
    above += keys[i] > key;
    equal += keys[i] == key;
  }
  // Both in one sum: neither reaches 2^16.
  const uint mine = above << 16 | equal;
  const uint earlier_lanes = simd_prefix_exclusive_sum(mine);
  scratch += 2 * me.groups;
  const uint all = total(mine, scratch, me);
  const uint before = earlier_lanes + simd_sum(me.lane < me.group ? scratch[me.lane] : 0u);
  Cut cut;
  cut.key = key;
  cut.equal = wanted - (all >> 16);
  cut.seen = before & 0xffffu;
  cut.place = (before >> 16) + min(cut.seen, cut.equal);
  return cut;
}

// body
  threadgroup uint scratch[3 * 16];
  threadgroup uint chosen[64];
  threadgroup uint best[64];
  threadgroup uint found[64];
  const uint me = thread_position_in_threadgroup.x;
  const size_t row = thread_position_in_grid.y;
  const uint count = size, wanted = k, blocks = (count + 127) / 128;
  const uint of_blocks = min(wanted, blocks);
  Place place;
  place.lane = thread_index_in_simdgroup;
  place.group = simdgroup_index_in_threadgroup;
  place.groups = threads_per_threadgroup.x / 32;

  uint heads[Maxima];
  for (int i = 0; i < Maxima; ++i) {
    const uint at = me * Maxima + i;
    heads[i] = at < blocks ? key_of<Bits>(maxima[row * blocks + at]) : 0;
  }
  Cut cut = cut_of<Bits, Maxima>(heads, of_blocks, scratch, place);
  for (int i = 0; i < Maxima; ++i) {
    if (takes(cut, heads[i])) chosen[cut.place++] = me * Maxima + i;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // In the order of their indices: the blocks are, and a thread's logits lie in one block.
  const uint slot = me * Each / 128;
  const uint first = slot < of_blocks ? chosen[slot] * 128 + me * Each % 128 : count;
  uint keys[Each];
  if (first + Each <= count) {
    for (int i = 0; i < Each; ++i) keys[i] = key_of<Bits>(float(logits[row * Width + first + i]));
  } else {
    for (int i = 0; i < Each; ++i) {
      keys[i] = first + i < count ? key_of<Bits>(float(logits[row * Width + first + i])) : 0;
    }
  }
  cut = cut_of<Bits, Each>(keys, wanted, scratch, place);
  for (int i = 0; i < Each; ++i) {
    if (takes(cut, keys[i])) {
      best[cut.place] = keys[i];
      found[cut.place++] = first + i;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (me < wanted) {
    uint rank = 0;
    for (uint i = 0; i < wanted; ++i) {
      rank += best[i] > best[me] || (best[i] == best[me] && i < me);
    }
    values[row * wanted + rank] = value_of<Bits>(best[me]);
    indices[row * wanted + rank] = found[me];
  }
