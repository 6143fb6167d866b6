"use strict";

function statement(answer) {
  if (answer.abstained) return "The votes are too close to answer.";
  if (!answer.certified) return `From ${answer.rows_used} noisy copies, without a radius.`;
  const radius = Math.floor(answer.radius * 1000) / 1000;
  return `Certified: no change shorter than ${radius} changes this label ` +
    `(alpha ${answer.alpha}, ${answer.rows_used} noisy copies, ` +
    `${answer.resolution}×${answer.resolution} pixels).`;
}

function show(answer) {
  busy(false);
  element("label").textContent = answer.abstained ? "No answer" : answer.label;
  element("statement").textContent = statement(answer);
  element("votes").replaceChildren(...answer.counts.slice(0, 10).map((vote) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    const bar = document.createElement("meter");
    Object.assign(name, { scope: "row", textContent: vote.label });
    Object.assign(bar, { max: answer.n, value: vote.count });
    bar.setAttribute("aria-label", `${vote.count} of ${answer.n} votes`);
    row.append(name);
    row.insertCell().append(bar);
    row.insertCell().textContent = vote.count;
    return row;
  }));
  element("answer").hidden = false;
}
