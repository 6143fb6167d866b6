// The labels of a task as chips, and the words that the networks know.

import { element, make } from "./dom.js";

export class Chips {
  labels = [];
  #wrong = [];

  constructor() {
    const entry = element("entry");
    entry.addEventListener("keydown", (event) => {
      if (event.key === "Enter") {
        event.preventDefault();  // It adds a label; the button makes the task.
        this.take();
      } else if (event.key === "Backspace" && !entry.value) {
        this.labels.pop();
        this.show();
      }
    });
    entry.addEventListener("input", () => {
      if (/[,;]/.test(entry.value)) this.take();
    });
    entry.addEventListener("paste", (event) => {
      event.preventDefault();
      entry.value += event.clipboardData.getData("text").replaceAll(/[\r\n]+/g, ",");
      if (entry.value.includes(",")) this.take();
    });
  }

  // The words of sets that know some only, each to be added by a click.
  offer(words) {
    element("known").hidden = !words.length;
    element("words").replaceChildren(...words.map((word) => {
      const button = make("button", { type: "button", textContent: word });
      button.addEventListener("click", () => this.add([word]));
      return button;
    }));
  }

  // Adds what stands in the field.
  take() {
    this.add(element("entry").value.split(/[,;]/));
    element("entry").value = "";
  }

  add(words) {
    const found = words.map((word) => word.trim()).filter(Boolean);
    this.labels.push(...found.filter((word) => !this.labels.includes(word)));
    this.show();
  }

  clear() {
    this.labels = [];
    this.mark([]);
  }

  // Marks the labels at these places as refused.
  mark(places) {
    this.#wrong = places;
    this.show();
  }

  show() {
    element("chips").replaceChildren(...this.labels.map((label, place) => {
      const remove = make("button", { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${label}`);
      remove.addEventListener("click", () => {
        this.labels.splice(place, 1);
        this.mark([]);
        element("entry").focus();
      });
      const isWrong = this.#wrong.includes(place);
      return make("span", { className: isWrong ? "chip wrong" : "chip" }, label, remove);
    }));
  }
}
