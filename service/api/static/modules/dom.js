// Elements, files and the clipboard.

export const element = (id) => document.getElementById(id);

// An element with properties and children; `data-` and `aria-` names are attributes.
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export const picture = (source, alt) => make("img", { src: source, alt });

export function save(name, document) {
  const text = JSON.stringify(document, null, 2) + "\n";
  const link = make("a", {
    href: URL.createObjectURL(new Blob([text], { type: "application/json" })),
    download: name,
  });
  link.click();
  URL.revokeObjectURL(link.href);
}

// Copies the text; without a clipboard, as over plain HTTP, the text is shown to be copied.
export async function copy(text, note) {
  try {
    await navigator.clipboard.writeText(text);
    note.textContent = "Copied.";
  } catch {
    note.replaceChildren(make("code", { textContent: text }));
  }
}

// Calls `chosen` with a file that is dropped on the element.
export function acceptDrops(target, chosen) {
  for (const kind of ["dragenter", "dragover"]) {
    target.addEventListener(kind, (event) => {
      event.preventDefault();
      target.classList.add("over");
    });
  }
  target.addEventListener("dragleave", () => target.classList.remove("over"));
  target.addEventListener("drop", (event) => {
    event.preventDefault();
    target.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) chosen(file);
  });
}
