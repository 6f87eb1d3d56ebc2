// 1 / sqrt(mean(x^2) + eps), from the sum of the squares of `width` elements.
METAL_FUNC float inverse_rms(float squares, int width, float eps) {
  return rsqrt(squares / float(width) + eps);
}

// 1 / sqrt(scale * (sum(x^2) + 1e-6)): the L2 norm of keys with scale 1; with scale D that of queries, which
// are divided by sqrt(D), too. 1e-6 keeps the norm of nothing finite.
METAL_FUNC float inverse_l2(float squares, float scale) {
  return rsqrt(scale * (squares + 1e-6f));
}
