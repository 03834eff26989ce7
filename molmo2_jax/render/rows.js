// Draws the rows of the page's data (render/rows.py) and says of each token whom it sees and who sees it.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const id = name => document.getElementById(name);
const VISUAL = "#2e86c1", GREY = "#808896", GROUND = "#14171d";
const EXPANDED = ["weights", "end", "group", "image", "example", "branch"];
let row = null, current = 0, view = [0, 1], owner = [];

function expand(pairs, step) {
  let length = 0;
  for (const [, count] of pairs) length += count;
  const out = new Float64Array(length);
  let place = 0;
  for (const [first, count] of pairs)
    for (let n = 0; n < count; n++) out[place++] = first + step * n;
  return out;
}

// Returns a row with its runs and ramps as arrays.
function unpacked(packed) {
  const found = {...packed, T: packed.tokens.length, positions: expand(packed.positions, 1)};
  for (const name of EXPANDED) found[name] = expand(packed[name], 0);
  return found;
}

// The mask, as attention/tree_mask.py defines it: whether query i sees key j.
const sees = (i, j) => (j <= i && i < row.end[j]) || (row.group[j] >= 0 && row.group[i] === row.group[j]);

// Returns [start, stop) of the runs of tokens for which `is` holds.
function intervals(is) {
  const found = [];
  let start = -1;
  for (let n = 0; n <= row.T; n++) {
    const holds = n < row.T && is(n);
    if (holds && start < 0) start = n;
    if (!holds && start >= 0) { found.push([start, n]); start = -1; }
  }
  return found;
}
const seenBy = i => intervals(j => sees(i, j));     // keys
const seersOf = j => intervals(i => sees(i, j));    // queries

const count = parts => parts.reduce((sum, [start, stop]) => sum + stop - start, 0);
const number = value => value.toLocaleString("en");
const spelt = token => data.texts[token];
const spoken = n => row.choices[n] || spelt(row.tokens[n]);   // with what the token chooses

function listed(parts) {
  const few = parts.slice(0, 6).map(([start, stop]) => stop - start === 1 ? `${start}` : `${start}–${stop - 1}`);
  return few.join(", ") + (parts.length > 6 ? `, and ${parts.length - 6} more runs` : "");
}

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const branchColour = branch => data.colours[branch % data.colours.length];
function keyColour(j) {
  if (row.image[j] >= 0) return VISUAL;
  return row.example[j] < 0 || row.branch[j] < 0 ? GREY : branchColour(row.branch[j]);
}

// Tokens

function show(n) {
  row = unpacked(data.rows[n]);
  current = 0; view = [0, row.T];
  id("token").max = row.T - 1;
  document.querySelectorAll(".drawing").forEach((one, place) => { one.hidden = place !== n; });
  const bars = Object.entries(row.budgets).map(([name, [used, size]]) => make("div", {},
    `${name}: ${number(used)} of ${number(size)} (${size ? (100 * used / size).toFixed(1) : 0} %)`,
    make("div", {class: "bar"}, make("b", {style: `width:${size ? 100 * used / size : 0}%`}))));
  id("budgets").replaceChildren(...bars);
  owner = new Array(row.T);
  const parts = [];
  for (let start = 0; start < row.T;) {
    let stop = start + 1;
    while (stop < row.T && row.example[stop] === row.example[start]) stop++;
    parts.push(row.example[start] < 0 ? part(start, stop, "padding") : example(start, stop));
    start = stop;
  }
  id("tokens").replaceChildren(...parts);
  colour();
  draw();
  choose(0, false);
}

function example(start, stop) {
  const place = row.example[start], member = row.members[place] || {};
  const node = make("article", {"data-example": place});
  const head = make("h3", {}, `example ${place}: ${member.key || "record not known"}`);
  if (member.source) head.append(make("small", {}, member.source));
  node.append(head, make("p", {class: "soft"}, size(start, stop, member)));
  if (member.left_out && member.left_out.length)
    node.append(make("ul", {class: "lost"}, ...member.left_out.map(([text, why]) =>
      make("li", {}, `left out: ${why} `, make("q", {}, text)))));
  const frames = row.frames.filter(one => one.first >= start && one.first < stop);
  if (frames.length) node.append(make("div", {class: "strip"}, ...frames.map(frame)));
  const branches = make("div", {class: "branches"});
  for (let first = start; first < stop;) {
    let last = first + 1;
    while (last < stop && row.branch[last] === row.branch[first]) last++;
    const branch = row.branch[first];
    (branch < 0 ? node : branches).append(part(first, last, branch < 0 ? "root" : `branch ${branch}`));
    first = last;
  }
  if (branches.childNodes.length) node.append(branches);
  return node;
}

function size(start, stop, member) {
  let text = `tokens ${number(start)} to ${number(stop - 1)} (${number(stop - start)}`;
  if (member.whole_tokens > stop - start) text += ` of ${number(member.whole_tokens)}`;
  text += ")";
  if (member.annotations !== undefined)
    text += `; ${member.annotations} annotations, ${member.branches} in the row`;
  return text;
}

function frame(one) {
  const label = one.label || `image ${row.image[one.first]}`;
  const extra = one.crops.length > 1 ? `, ${one.crops.length} crops` : "";
  const button = make("button", {type: "button", "data-go": one.first},
    ...one.crops.slice(0, 1).map(src => make("img", {src, alt: ""})),
    make("span", {}, `${label}${extra}`));
  const node = make("figure", {}, button);
  if (one.crops.length > 1)
    node.append(make("details", {}, make("summary", {}, "crops"), make("div", {class: "strip"},
      ...one.crops.slice(1).map((src, n) => make("img", {src, alt: `crop ${n + 1} of ${label}`})))));
  return node;
}

// Returns the tokens [start, stop) of a root, a branch or padding; consecutive tokens of a frame are one.
function part(start, stop, name) {
  const node = make("div", {class: "part"}, make("b", {class: "name"}, name));
  if (row.branch[start] >= 0) node.style.setProperty("--edge", branchColour(row.branch[start]));
  for (let n = start; n < stop;) {
    let last = n + 1, text = spoken(n);
    const isPad = row.example[n] < 0;
    if (isPad || row.image[n] >= 0) {
      while (last < stop && (isPad || row.image[last] === row.image[n])) last++;
      text = isPad ? `${number(last - n)} tokens of padding`
        : `${(row.frames[row.image[n]] || {}).label || `image ${row.image[n]}`}: ${last - n} visual tokens`;
    }
    const token = make("span", {class: last - n > 1 || isPad ? "t chip" : "t", "data-first": n}, text);
    for (let k = n; k < last; k++) owner[k] = token;
    node.append(token);
    n = last;
  }
  return node;
}

function colour() {
  const by = document.querySelector("input[name=colour]:checked").value;
  let most = 0;
  for (const weight of row.weights) most = Math.max(most, weight);
  let before = null;
  for (let n = 0; n < row.T; n++) {
    if (owner[n] === before) continue;
    before = owner[n];
    const share = by === "weight" ? (most ? row.weights[n] / most : 0) : row.example[n] < 0 ? 0 : 1;
    const base = by === "weight" ? "var(--accent)" : keyColour(n);
    const strength = by === "weight" ? 15 + 60 * share : 30;
    owner[n].style.setProperty("--c", share > 0 ? `color-mix(in srgb, ${base} ${strength}%, transparent)` : "none");
  }
}

// The chosen token

function choose(n, scrolls = true) {
  owner[current].classList.remove("now");
  current = Math.max(0, Math.min(row.T - 1, n));
  owner[current].classList.add("now");
  id("token").value = current;
  if (scrolls) owner[current].scrollIntoView({block: "nearest"});
  const keys = seenBy(current), queries = seersOf(current);
  id("said").textContent = [
    `token ${number(current)}: ${JSON.stringify(spoken(current))}, id ${row.tokens[current]}`,
    `${row.example[current] < 0 ? "padding" : `example ${row.example[current]}, ` + (row.branch[current] < 0
      ? "root" : `branch ${row.branch[current]}`)}, position ${number(row.positions[current])}`
      + (row.image[current] >= 0 ? `, image ${row.image[current]}` : ""),
    `target ${JSON.stringify(spelt(row.targets[current]))}, id ${row.targets[current]}, loss weight ${
      Number(row.weights[current].toPrecision(6))}`,
    `sees ${number(count(keys))} tokens: ${listed(keys)}`,
    `seen by ${number(count(queries))} tokens: ${listed(queries)}`].join("\n");
  mark("seen", queries);
  mark("sees", keys);
  cross(keys, queries);
}

function mark(name, parts) {
  if (!window.Highlight || !CSS.highlights) return;
  const ranges = parts.map(([start, stop]) => {
    const range = new Range();
    range.setStart(owner[start].firstChild || owner[start], 0);
    range.setEndAfter(owner[stop - 1].lastChild || owner[stop - 1]);
    return range;
  });
  CSS.highlights.set(name, new Highlight(...ranges));
}

// The mask

const mask = id("mask"), over = id("cross");

function pixels() {
  const side = Math.max(64, Math.min(1024, Math.round(mask.clientWidth * (window.devicePixelRatio || 1))));
  return Math.min(side, Math.max(64, (view[1] - view[0]) * 16));
}

function rgb(colour) {
  return [1, 3, 5].map(place => parseInt(colour.slice(place, place + 2), 16));
}

function draw() {
  const side = pixels(), [low, high] = view, context = mask.getContext("2d");
  for (const canvas of [mask, over]) { canvas.width = side; canvas.height = side; }
  const image = context.createImageData(side, side), ground = rgb(GROUND);
  const at = Array.from({length: side}, (_, n) => low + Math.floor(n * (high - low) / side));
  const colours = at.map(j => rgb(keyColour(j)));
  for (let y = 0; y < side; y++)
    for (let x = 0; x < side; x++) {
      const i = at[y], j = at[x], is = sees(i, j), place = 4 * (y * side + x);
      for (let c = 0; c < 3; c++)
        image.data[place + c] = is ? (j > i ? 0.55 * colours[x][c] + 115 : colours[x][c]) : ground[c];
      image.data[place + 3] = 255;
    }
  context.putImageData(image, 0, 0);
  id("window").textContent = high - low === row.T ? `all ${number(row.T)} tokens`
    : `tokens ${number(low)} to ${number(high - 1)}`;
}

// Marks, in the mask, the line of the chosen token (keys it sees) and its column (queries that see it).
function cross(keys, queries) {
  const context = over.getContext("2d"), scale = over.width / (view[1] - view[0]);
  context.clearRect(0, 0, over.width, over.height);
  const middle = (current - view[0]) * scale, thick = Math.max(2, scale);
  const bars = (parts, colour, fill) => {
    context.fillStyle = colour;
    for (const [start, stop] of parts) fill((start - view[0]) * scale, (stop - start) * scale);
  };
  bars(keys, "rgba(255,255,255,.75)", (place, length) => context.fillRect(place, middle, Math.max(1, length), thick));
  bars(queries, "rgba(251,146,60,.8)", (place, length) => context.fillRect(middle, place, thick, Math.max(1, length)));
}

function zoom(factor) {
  const length = Math.max(16, Math.min(row.T, Math.round((view[1] - view[0]) * factor)));
  const low = Math.max(0, Math.min(row.T - length, current - Math.floor(length / 2)));
  view = [low, low + length];
  draw();
  choose(current, false);
}

// Events

const MOVES = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1, PageDown: 100, PageUp: -100,
  Home: -Infinity, End: Infinity};
function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in MOVES) choose(current + MOVES[event.key]);
  else if (event.key === "+" || event.key === "=") zoom(0.5);
  else if (event.key === "-") zoom(2);
  else if (event.key === "0") zoom(Infinity);
  else return;
  event.preventDefault();
}
const tokenAt = event => event.target.closest && event.target.closest("[data-first]");
id("tokens").addEventListener("keydown", keys);
mask.addEventListener("keydown", keys);
id("tokens").addEventListener("pointerover", event => {
  const found = tokenAt(event);
  if (found) choose(Number(found.dataset.first), false);
});
id("tokens").addEventListener("click", event => {
  const button = event.target.closest("[data-go]"), found = tokenAt(event);
  if (button) choose(Number(button.dataset.go));
  else if (found) choose(Number(found.dataset.first), false);
});
mask.addEventListener("pointermove", event => {
  const box = mask.getBoundingClientRect(), length = view[1] - view[0];
  const token = offset => view[0] + Math.max(0, Math.min(length - 1, Math.floor(offset * length)));
  const i = token((event.clientY - box.top) / box.height), j = token((event.clientX - box.left) / box.width);
  choose(i, false);
  mask.title = `query ${i} ${sees(i, j) ? "sees" : "does not see"} key ${j}`;
});
id("token").addEventListener("change", event => choose(Number(event.target.value)));
document.querySelectorAll("input[name=colour]").forEach(one => one.addEventListener("change", colour));
id("number").append(...data.rows.map((_, n) => make("option", {value: n}, `${n}`)));
id("number").addEventListener("change", event => show(Number(event.target.value)));
window.addEventListener("resize", () => { draw(); choose(current, false); });

show(0);
window.inspector = {sees, seenBy, seersOf, choose, show, row: () => row};   // for the console
})();
