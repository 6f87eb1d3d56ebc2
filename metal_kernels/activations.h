// 1 / (1 + exp(-x)). exp is given -|x| only: it never overflows, and small results keep their digits.
METAL_FUNC float sigmoid(float x) {
  const float e = exp(-fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// The same as it is written: 0 where exp(-x) overflows.
METAL_FUNC float sigmoid_as_written(float x) {
  return 1.0f / (1.0f + metal::exp(-x));
}

// x * sigmoid(x), as it is written.
METAL_FUNC float silu(float x) {
  return x / (1.0f + metal::exp(-x));
}

// log(1 + exp(x)). The quotient undoes the rounding of 1 + e, without which slow decays would stop.
METAL_FUNC float softplus(float x) {
  const float e = exp(-fabs(x));
  const float sum = 1.0f + e;
  return max(x, 0.0f) + (sum == 1.0f ? e : log(sum) * e / (sum - 1.0f));
}
