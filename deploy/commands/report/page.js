"use strict";
document.documentElement.classList.add("script");

// A slider's right end shows the image after: the line that parts them then stands at the left edge.
function show(frames, value) {
  frames.querySelector("input").value = value;
  frames.style.setProperty("--at", 100 - value + "%");
}

function slide(frames, event) {
  const box = frames.getBoundingClientRect();
  const left = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
  show(frames, 100 - 100 * left);
}

const all = [...document.querySelectorAll(".frames")];
for (const frames of all) {
  frames.querySelector("input").addEventListener("input", (event) => show(frames, event.target.value));
  frames.addEventListener("pointerdown", (event) => slide(frames, event));
  frames.addEventListener("pointermove", (event) => {
    if (event.buttons || event.pointerType === "touch") slide(frames, event);
  });
  frames.addEventListener("dragstart", (event) => event.preventDefault());
}
document.getElementById("all")?.addEventListener("input", (event) => {
  for (const frames of document.querySelectorAll("#gallery .frames")) show(frames, event.target.value);
});

// A pause before a clip has begun rejects the promise of play.
const play = (clip) => clip.play().catch(() => {});

// The two clips of a pair play together, from the same frame.
for (const pair of document.querySelectorAll(".clips")) {
  const [before, after] = pair.querySelectorAll("video");
  for (const [one, other] of [[before, after], [after, before]]) {
    one.addEventListener("play", () => {
      if (other.paused) other.currentTime = one.currentTime;
      play(other);
    });
    one.addEventListener("pause", () => other.pause());
    one.addEventListener("seeked", () => {
      if (one.paused && other.currentTime !== one.currentTime) other.currentTime = one.currentTime;
    });
  }
}
document.getElementById("play")?.addEventListener("click", (event) => {
  const clips = [...document.querySelectorAll("#gallery video")];
  const still = clips.every((clip) => clip.paused);
  for (const clip of clips) still ? play(clip) : clip.pause();
  event.target.textContent = still ? "Pause all" : "Play all";
});

// What is missing stays at the end, whichever way a column is sorted.
function compare(one, other, direction, numeric) {
  if (one === "" || other === "") return (one === "") - (other === "");
  return direction * (numeric ? one - other : one.localeCompare(other));
}

function sort(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const numeric = head.classList.contains("number");
  const descending = head.ariaSort ? head.ariaSort === "ascending" : numeric;
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows];
  rows.sort((one, other) => compare(value(one), value(other), descending ? -1 : 1, numeric));
  table.tBodies[0].append(...rows);
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, column));
    head.append(button);
  });
}
