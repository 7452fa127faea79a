"use strict";
// Draws, and shows what the server says. Rows are made by the server, with the demo's own encoder.

const PAUSE = 600; // ms without the pen before the model is asked
const NEXT = 2000; // ms after which a new line begins another digit
const PREVIEW = 100; // ms between two looks at the rows while the pen moves
const $ = (selector, root = document) => root.querySelector(selector);
const pad = $("#pad");
const lanes = { sent: $("#sent"), shuffled: $("#shuffled") };

let strokes = []; // of points [x, y], 0 to 1
let start = { samples: {}, question: "" };
let seed = 1; // of the shuffled rows
let turn = 0; // counts drawings and questions: what comes late belongs to an earlier one
let asking = new AbortController();
let pause, preview, animation;

function paint() {
  const side = Math.round(pad.clientWidth * devicePixelRatio);
  if (pad.width !== side || pad.height !== side) pad.width = pad.height = side;
  const pen = pad.getContext("2d");
  pen.clearRect(0, 0, side, side);
  pen.lineWidth = side / 13;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = getComputedStyle(pad).color;
  for (const stroke of strokes) {
    pen.beginPath();
    for (const [x, y] of [stroke[0], ...stroke]) pen.lineTo(x * side, y * side);
    pen.stroke();
  }
}

function node(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function showRows(lane, rows) {
  const figures = Object.entries(rows).map(([name, item]) => {
    const grid = item.map((row) => node("div", "row", ...row.map((value) => {
      const cell = node("i", "");
      cell.title = value;
      cell.style.setProperty("--share", Math.min(1, Math.max(0, (value + 1) / 3)).toFixed(3));
      return cell;
    })));
    const size = ` ${item.length} rows of ${item[0].length}`;
    const caption = node("figcaption", "", node("b", "", name), size);
    return node("figure", name, node("div", "rows", ...grid), caption);
  });
  $(".prompt", lane).replaceChildren(...figures, node("q", "", start.question));
}

function showChances(lane, chances) {
  const best = Object.entries(chances).sort((a, b) => b[1] - a[1])[0]?.[0];
  $(".chances", lane).replaceChildren(...Array.from("0123456789", (digit) => {
    const bar = node("span", digit === best ? "best" : "", digit);
    bar.style.setProperty("--share", (chances[digit] ?? 0).toFixed(3));
    bar.title = (100 * (chances[digit] ?? 0)).toFixed(1) + "%";
    return bar;
  }));
}

function showTime(lane, milliseconds) {
  const shown = milliseconds === null ? [] : [node("b", "", `${milliseconds.toFixed(0)} ms`), "to the first token"];
  $(".time", lane).replaceChildren(...shown);
}

function blank(lane) {
  $(".said", lane).textContent = "";
  showChances(lane, {});
  showTime(lane, null);
  delete lane.dataset.done;
}

const say = (problem) => { $("#problem").textContent = problem; };

async function post(path, body, signal) {
  const answer = await fetch(path, {
    method: "POST", signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
  });
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

async function* lines(answer, signal) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n");
    text = parts.pop();
    for (const line of parts) {
      signal.throwIfAborted(); // what had come already is of a drawing that is gone
      yield JSON.parse(line);
    }
  }
}

async function ask(lane, shuffle, signal) {
  blank(lane);
  const sent = performance.now();
  const answer = await post("ask", { strokes, shuffle }, signal);
  let waiting = true;
  for await (const event of lines(answer, signal)) {
    if (event.error) throw new Error(event.error);
    if (event.rows) showRows(lane, event.rows);
    if (event.token === undefined) continue;
    if (waiting) {
      waiting = false;
      showTime(lane, performance.now() - sent);
      showChances(lane, event.chances);
    }
    $(".said", lane).textContent = ($(".said", lane).textContent + event.token).trim();
  }
  signal.throwIfAborted();
  lane.dataset.done = "true";
}

async function askBoth(order = [["sent", null], ["shuffled", seed]]) {
  if (!strokes.length) return;
  turn += 1;
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  say("");
  try {
    for (const [name, shuffle] of order) await ask(lanes[name], shuffle, signal);
  } catch (error) {
    if (!signal.aborted) say(error.message);
  }
}

async function look() {
  preview = undefined;
  if (!strokes.length) return;
  const began = turn;
  try {
    const answer = await (await post("rows", { strokes })).json();
    if (began === turn) showRows(lanes.sent, answer.rows);
  } catch (error) {
    say(error.message);
  }
}

function changed(whole) {
  paint();
  clearTimeout(pause);
  if (whole) pause = setTimeout(askBoth, PAUSE);
  preview ??= setTimeout(look, PREVIEW);
}

function clear() {
  turn += 1;
  strokes = [];
  for (const timer of [pause, preview]) clearTimeout(timer);
  cancelAnimationFrame(animation);
  preview = undefined;
  asking.abort();
  say("");
  for (const lane of Object.values(lanes)) {
    blank(lane);
    $(".prompt", lane).replaceChildren(node("q", "", start.question));
  }
  paint();
}

function write(digit) {
  clear();
  const whole = start.samples[digit];
  const total = whole.flat().length;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let shown = still ? total : 1;
  const step = () => {
    let left = shown;
    strokes = [];
    for (const stroke of whole) {
      if (left > 0) strokes.push(stroke.slice(0, left));
      left -= stroke.length;
    }
    changed(shown === total);
    if (shown++ < total) animation = requestAnimationFrame(step);
  };
  step();
}

function point(event) {
  const box = pad.getBoundingClientRect();
  const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return place.map((value) => Number(value.toFixed(4)));
}

let pen = null; // the pointer that draws
let lifted = -Infinity; // when it last left the pad
pad.addEventListener("pointerdown", (event) => {
  if (pen !== null || event.button) return;
  event.preventDefault();
  cancelAnimationFrame(animation);
  if (performance.now() - lifted > NEXT) clear(); // else this line belongs to the same digit
  pen = event.pointerId;
  pad.setPointerCapture(pen);
  strokes.push([point(event)]);
  changed(false);
});
pad.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pen) return;
  const last = strokes.at(-1).at(-1);
  const here = point(event);
  if (Math.hypot(here[0] - last[0], here[1] - last[1]) < 0.01) return;
  strokes.at(-1).push(here);
  changed(false);
});
for (const name of ["pointerup", "pointercancel"]) {
  pad.addEventListener(name, (event) => { 
    if (event.pointerId !== pen) return;
    pen = null;
    lifted = performance.now();
    changed(true);
  });
}

function again() {
  seed += 1;
  askBoth([["shuffled", seed]]);
}
$("#clear").addEventListener("click", clear);
$("#again").addEventListener("click", again);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in start.samples) write(event.key);
  else if (event.key === "Escape") clear();
  else if (event.key === "s" || event.key === "S") again();
});
addEventListener("resize", paint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

(async () => {
  clear();
  start = await (await fetch("start")).json();
  $("#samples").replaceChildren(...Object.keys(start.samples).map((digit) => {
    const button = node("button", "", digit);
    button.type = "button";
    button.setAttribute("aria-label", `Write a ${digit}`);
    button.addEventListener("click", () => write(digit));
    return button;
  }));
  write("3");
})();
