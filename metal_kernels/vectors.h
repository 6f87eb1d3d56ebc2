// N neighbouring elements at once. They lie in device memory, where MLX puts every input of 8
// elements or more, and the first is a multiple of N elements away from the start of its array.

template <int N>
METAL_FUNC vec<float, N> filled(float x) {
  vec<float, N> y;
  for (int i = 0; i < N; ++i) {
    y[i] = x;
  }
  return y;
}

// As they are stored.
template <int N, typename T>
METAL_FUNC vec<T, N> fetch(const device T* p) {
  return *(const device vec<T, N>*)p;
}

// N elements of any float type, as float.
template <int N, typename T>
METAL_FUNC vec<float, N> load(const device T* p) {
  const vec<T, N> x = fetch<N>(p);
  vec<float, N> y;
  for (int i = 0; i < N; ++i) {
    y[i] = float(x[i]);
  }
  return y;
}

// The same of threadgroup memory, which is an array of such vectors.
template <int N>
METAL_FUNC vec<float, N> load(const threadgroup float* p) {
  return *(const threadgroup vec<float, N>*)p;
}

// The same where `inside`; elsewhere nothing is read and every element is `outside`.
template <int N, typename T>
METAL_FUNC vec<float, N> load_if(bool inside, const device T* p, float outside) {
  if (inside) {
    return load<N>(p);
  }
  return filled<N>(outside);
}

template <int N, typename T>
METAL_FUNC void store(device T* p, vec<float, N> x) {
  vec<T, N> y;
  for (int i = 0; i < N; ++i) {
    y[i] = T(x[i]);
  }
  *(device vec<T, N>*)p = y;
}

// One element; its type is named nowhere else.
template <typename T>
METAL_FUNC void put(device T* p, float x) {
  *p = T(x);
}
