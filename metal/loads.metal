// Neighbouring elements or words that are loaded at once; the address is a multiple of their size.

template <typename T>
inline float4 four(const device T* p) {
  const auto v = *reinterpret_cast<const device vec<T, 4>*>(p);
  return float4(float(v.x), float(v.y), float(v.z), float(v.w));
}

inline void fetch(const device uint* p, thread uint (&w)[1]) { w[0] = p[0]; }
inline void fetch(const device uint* p, thread uint (&w)[2]) {
  const uint2 v = *reinterpret_cast<const device uint2*>(p);
  w[0] = v.x;
  w[1] = v.y;
}
inline void fetch(const device uint* p, thread uint (&w)[4]) {
  const uint4 v = *reinterpret_cast<const device uint4*>(p);
  w[0] = v.x;
  w[1] = v.y;
  w[2] = v.z;
  w[3] = v.w;
}
