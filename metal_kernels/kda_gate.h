inline float sigmoid(float x) {
  const float e = exp(-fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// log(1 + exp(x)). The quotient undoes the rounding of 1 + e, without which slow decays would stop.
inline float softplus(float x) {
  const float e = exp(-fabs(x));
  const float sum = 1.0f + e;
  return max(x, 0.0f) + (sum == 1.0f ? e : log(sum) * e / (sum - 1.0f));
}
