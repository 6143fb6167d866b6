// Probabilities for what the page explains; proofs are computed by the service alone.

// The quantile of the normal distribution, by bisection of its distribution function.
export function probit(probability) {
  let [low, high] = [-9, 9];
  for (let step = 0; step < 60; ++step) {
    const middle = (low + high) / 2;
    if (normal(middle) < probability) low = middle;
    else high = middle;
  }
  return low;
}

// The normal distribution function, by the series of Marsaglia (2004).
function normal(x) {
  if (Math.abs(x) > 8) return x < 0 ? 0 : 1;
  let [sum, term] = [x, x];
  for (let i = 3; sum + term !== sum; i += 2) {
    term *= (x * x) / i;
    sum += term;
  }
  return 0.5 + sum * Math.exp(-0.5 * x * x - 0.91893853320467274178);
}

// A normal draw, by Box and Muller.
export const draw = () =>
  Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
