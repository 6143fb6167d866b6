// The chosen picture: a file, a pasted or dropped one, or an example.

import { acceptDrops, element, make, picture } from "./dom.js";

const EXAMPLES = ["ship.png", "dog.png", "horse.png", "frog.png", "truck.png", "deer.png", "cat.png",
  "bird.png", "strawberry.jpg"];

let chosen = null;
let heard = () => {};

export const chosenPicture = () => chosen;

function choose(file, example = null) {
  chosen = file;
  URL.revokeObjectURL(element("preview").src);
  element("preview").src = URL.createObjectURL(file);
  element("preview").hidden = false;
  for (const button of element("examples").children) {
    button.setAttribute("aria-pressed", button === example);
  }
  heard();
}

async function chooseExample(button) {
  const response = await fetch(`static/examples/${button.title}`);
  choose(new File([await response.blob()], button.title), button);
}

// `changed` is called for each picture that is chosen.
export function offerPictures(changed) {
  heard = changed;
  element("examples").replaceChildren(...EXAMPLES.map((name) => {
    const words = `Example: ${name.split(".")[0]}`;
    const button = make("button", { type: "button", title: name, "aria-pressed": "false" },
      picture(`static/examples/${name}`, words));
    button.addEventListener("click", () => chooseExample(button));
    return button;
  }));
  element("image").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) choose(file);
  });
  chooseExample(element("examples").firstElementChild);
  acceptDrops(element("drop"), choose);
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) choose(file);
  });
}
