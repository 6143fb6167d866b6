"use strict";

let certificate = null;

const whole = (number) => number.toLocaleString("en");

// Shown numbers are rounded down, for none may be larger than what is proven.
const down = (value, places) => Math.floor(value * 10 ** places) / 10 ** places;

function statement(answer) {
  if (answer.abstained) return whyNone(answer.abstention);
  const rows = `${whole(answer.rows_used)} noisy copies`;
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

function inGrayLevels({ attack_norms: norms }) {
  if (!norms) return "";
  const levels = norms.linf_gray_levels;
  const most = levels < 1 ? `less than one gray level of 255: by up to ${down(levels, 2)}` :
    `up to ${down(levels, 1)} of 255 gray levels`;
  return `Every pixel value may change by ${most}. The whole picture may get that much ` +
    "brighter or darker.";
}

function targetInWords(answer) {
  if (answer.target_radius === null) return "";
  return `The radius that suffices, ${answer.target_radius}, was ` +
    `${answer.target_reached ? "" : "not "}reached with ${whole(answer.rows_used)} of at most ` +
    `${whole(answer.n0 + answer.n)} noisy copies.`;
}

function runnerUp(answer) {
  if (answer.abstained || answer.runner_up === null) return "";
  const hasVotes = answer.counts.some((vote) => vote.label === answer.runner_up);
  return hasVotes ? `Runner-up: ${answer.runner_up}.` : "No other label has a vote.";
}

function among({ labels }) {
  const more = labels.length - 10;
  const named = labels.slice(0, 10).join(", ") + (more > 0 ? ` and ${whole(more)} more` : "");
  return `Chosen among ${whole(labels.length)} labels: ${named}. ` +
    "A picture of none of them gets one of them too.";
}

function show(answer) {
  busy(false);
  element("label").textContent = answer.abstained ? "No answer" : answer.label;
  element("statement").textContent = statement(answer);
  element("levels").textContent = inGrayLevels(answer);
  element("reached").textContent = targetInWords(answer);
  element("runner-up").textContent = runnerUp(answer);
  element("among").textContent = among(answer);
  const total = answer.counts.reduce((sum, vote) => sum + vote.count, 0);
  element("votes").replaceChildren(...answer.counts.slice(0, 10).map((vote) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    const bar = document.createElement("meter");
    Object.assign(name, { scope: "row", textContent: vote.label });
    Object.assign(bar, { max: total, value: vote.count });
    bar.setAttribute("aria-label", `${vote.count} of ${total} votes`);
    row.append(name);
    row.insertCell().append(bar);
    row.insertCell().textContent = vote.count;
    return row;
  }));
  certificate = answer.certificate;
  element("certificate").hidden = !certificate;
  if (certificate) element("verify").textContent = `vouchsafe verify ${certificateName()}`;
  element("answer").hidden = false;
}

const certificateName = () => `certificate-${certificate.document.id}.json`;

function saveCertificate() {
  const text = JSON.stringify(certificate, null, 2) + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = certificateName();
  link.click();
  URL.revokeObjectURL(link.href);
}
