// The answer's numbers, and what they mean, in sentences.

import { probit } from "./statistics.js";

export const whole = (number) => number.toLocaleString("en");

// Shown numbers are rounded down, for none may be larger than what is proven.
export const down = (value, places) => Math.floor(value * 10 ** places) / 10 ** places;

export const inTime = (seconds) => (seconds < 90 ? `about ${Math.max(1, Math.ceil(seconds))} s` :
  `about ${Math.round(seconds / 60)} min`);

export function statement(answer) {
  if (answer.abstained) return whyNone(answer.abstention);
  const rows = `${whole(answer.rows_used)} noisy copies`;
  if (answer.mode === "purify") return "From cleaned copies of the picture. Nothing is proven.";
  if (!answer.certified) return `From ${rows}, without a radius.`;
  return `Certified: no change shorter than ${down(answer.radius, 3)} in l2 norm changes this ` +
    `label (alpha ${answer.alpha}, ${rows}, ${answer.resolution}×${answer.resolution} pixels).`;
}

function whyNone({ reason, rows_needed: rows }) {
  if (reason === "hopeless") {
    return "The service gave up early: after these votes the radius that suffices is almost " +
      "certainly out of reach.";
  }
  if (reason === "too_close") {
    return "The votes are too close to answer. Even 100,000 noisy copies would probably not do.";
  }
  return `The noisy copies are too few to answer. About ${whole(rows)} would do; asking with ` +
    "them is a new trial, with its own alpha.";
}

// What a change of this length may be, as sentences.
export function inGrayLevels({ attack_norms: norms }) {
  if (!norms) return [];
  const levels = norms.linf_gray_levels;
  const most = levels < 1 ? `less than one gray level of 255: by up to ${down(levels, 2)}` :
    `up to ${down(levels, 1)} of 255 gray levels`;
  const one = norms.patch_gray_levels["1"];
  const pixel = one >= 255 ? "One whole pixel may become anything." :
    `Or one single pixel may change by ${down(one, 1)} gray levels.`;
  return [
    `Every pixel value may change by ${most}. The whole picture may get that much brighter or darker.`,
    pixel,
  ];
}

export function targetInWords(answer) {
  if (answer.target_radius === null) return "";
  return `The radius that suffices, ${answer.target_radius}, was ` +
    `${answer.target_reached ? "" : "not "}reached with ${whole(answer.rows_used)} of at most ` +
    `${whole(answer.n0 + answer.n)} noisy copies.`;
}

export function runnerUp(answer) {
  if (answer.abstained || answer.runner_up === null) return "";
  const hasVotes = answer.counts.some((vote) => vote.label === answer.runner_up);
  return hasVotes ? `Runner-up: ${answer.runner_up}.` : "No other label has a vote.";
}

export function among({ labels }) {
  const more = labels.length - 10;
  const named = labels.slice(0, 10).join(", ") + (more > 0 ? ` and ${whole(more)} more` : "");
  return `Chosen among ${whole(labels.length)} labels: ${named}. ` +
    "A picture of none of them gets one of them too.";
}

// The radius that n unanimous votes prove (method of the answer; its share of alpha for the label).
export function largestRadius({ sigma, n, alpha_shares: shares }) {
  return sigma * probit(shares.label ** (1 / n));
}

// What would make the radius larger, or an answer possible.
export function advice(answer, largestSigma) {
  const { sigma, n } = answer;
  const more = sigma * 2 <= largestSigma ? ` Twice the noise (sigma ${sigma * 2}) could prove up ` +
    "to twice the radius, for pictures that survive it." : "";
  if (answer.abstained) {
    return sigma > 0.1 ? `Less noise (sigma ${sigma / 2}) often settles it, with a smaller radius. ` +
      "A picture of none of the labels may never be settled." : "";
  }
  if (!answer.certified) return "";
  const votes = answer.counts.reduce((sum, { count }) => sum + count, 0);
  if (answer.counts[0].count === votes) {
    const farther = largestRadius({ ...answer, n: n * 10 });
    return n > 10000 ? `All copies agree.${more}` : `All copies agree, so only the number of ` +
      `copies limits the radius: ${whole(n * 10)} could prove ${down(farther, 2)}.${more}`;
  }
  const [first, second] = answer.counts.map(({ count }) => probit(count / votes));
  const limit = (sigma / 2) * (first - second);
  return `The votes differ, so more copies bring the radius to about ${down(limit, 2)} at most.${more}`;
}
