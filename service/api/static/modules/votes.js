// Votes as bars, and the proven radius as it climbs.

import { element, make } from "./dom.js";
import { down, whole } from "./words.js";

const SHOWN = 10;
const SVG = "http://www.w3.org/2000/svg";

export function showVotes(counts) {
  const total = counts.reduce((sum, vote) => sum + vote.count, 0);
  element("votes-table").hidden = !counts.length;
  element("votes").replaceChildren(...counts.slice(0, SHOWN).map(({ label, count }) => {
    const bar = make("meter", { max: total, value: count });
    bar.setAttribute("aria-label", `${count} of ${total} votes`);
    return make("tr", {}, make("th", { scope: "row", textContent: label }), make("td", {}, bar),
      make("td", { textContent: whole(count) }));
  }));
}

const draw = (tag, attributes) => {
  const drawn = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) drawn.setAttribute(name, value);
  return drawn;
};

// The radii that were proven so far, by the number of copies; one chart a question.
export class Climb {
  constructor(rows, target) {
    this.rows = rows;
    this.target = Number(target) || 0;
    this.points = [];
  }

  add({ rows, radius, counts }) {
    this.points.push([rows, radius]);
    showVotes(counts);
    const proven = radius ? `radius ${down(radius, 3)}` : "no radius";
    element("proven").textContent = `Proven so far: ${proven}, from ${whole(rows)} noisy copies.`;
    element("climb").replaceChildren(...this.drawn());
  }

  drawn() {
    const [width, height] = [300, 70];
    const most = Math.max(this.target, ...this.points.map(([, radius]) => radius), 0.05) * 1.05;
    const last = this.points.at(-1)[0];
    const across = (rows) => (rows / Math.max(last, Math.min(this.rows, last * 2))) * width;
    const up = (radius) => height - (radius / most) * height;
    const chart = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    chart.setAttribute("aria-label", `Proven radius after each look, now ${down(this.points.at(-1)[1], 3)}`);
    chart.append(draw("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }));
    if (this.target) {
      const y = up(this.target);
      chart.append(draw("line", { class: "goal", x1: 0, x2: width, y1: y, y2: y }));
    }
    const places = [[0, 0], ...this.points].map(([rows, radius]) => `${across(rows)},${up(radius)}`);
    chart.append(draw("polyline", { class: "line", points: places.join(" ") }));
    const words = this.target ? `, towards ${this.target}` : "";
    const caption = make("p", { className: "hint", textContent: `Radius proven, by copies counted${words}` });
    return [chart, caption];
  }
}
