// The page: media, conversation, points over the media at their times, downloads.
import * as client from "./client.js";
import * as marks from "./marks.js";

const id = name => document.getElementById(name);
const video = id("video"), log = id("log"), question = id("question");
const MOST_BYTES = 350e6;   // a longer file does not fit a text of the browser

// media: {kind: "video" | "image", name, data (URL to send), shown (URL to show)}.
// turns: {role, content, points, usage, frames, node}; `chosen` is the answer whose points are drawn.
const state = {media: [], turns: [], chosen: null, running: null, model: ""};

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const isVideo = () => state.media.length > 0 && state.media[0].kind === "video";
const points = () => (state.chosen ? state.chosen.points : []);

function complain(text) {
  id("problem").textContent = text;
  id("problem").hidden = !text;
}

// Media

function dataOf(blob) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function take(files) {
  const chosen = [...files], films = chosen.filter(one => !one.type.startsWith("image/"));
  if (!chosen.length) return;
  if (films.length && chosen.length > 1) return complain("Choose one video, or images.");
  const large = chosen.find(one => one.size > MOST_BYTES);
  if (large) return complain(`${large.name} has ${Math.round(large.size / 1e6)} MB; at most ${MOST_BYTES / 1e6} MB can be sent from a page.`);
  complain("");
  fresh();
  state.media.forEach(one => URL.revokeObjectURL(one.shown));
  state.media = await Promise.all(chosen.map(async one => ({
    kind: films.length ? "video" : "image", name: one.name, data: await dataOf(one), shown: URL.createObjectURL(one)})));
  stage();
}

function stage() {
  id("stage").hidden = false;
  id("unplayable").hidden = true;
  id("film").hidden = !isVideo();
  id("pictures").replaceChildren();
  document.querySelectorAll("[data-video]").forEach(one => { one.disabled = !isVideo(); });
  if (isVideo()) {
    video.src = state.media[0].shown;
    video.setAttribute("aria-label", state.media[0].name);
  } else {
    video.removeAttribute("src");
    state.media.forEach((one, n) => {
      const name = state.media.length > 1 ? `image ${n + 1}: ${one.name}` : one.name;
      id("pictures").append(make("figure", {}, make("div", {class: "frame"},
        make("img", {src: one.shown, alt: name, onload: paint}), make("canvas", {class: "marks", "aria-hidden": "true"})),
        make("figcaption", {}, name)));
    });
  }
  show(null);
  question.focus();
}

function seek(second) {
  video.pause();
  video.currentTime = second;
}

// Points

function canvasOf(frame) {
  const canvas = frame.querySelector("canvas"), scale = window.devicePixelRatio || 1;
  const width = frame.clientWidth, height = frame.clientHeight;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return {context, width, height};
}

function boxOf(width, height, shown, n) {
  const sizes = (state.chosen && state.chosen.sizes) || [];
  return marks.fitted(width, height, shown, sizes[n] || shown);
}

function paint() {
  if (isVideo()) {
    const {context, width, height} = canvasOf(id("film"));
    if (!video.videoWidth) return;
    const box = boxOf(width, height, [video.videoWidth, video.videoHeight], 0), now = video.currentTime;
    const trails = marks.byId(points()).map(([, list]) => list.filter(one => one.time <= now))
      .filter(list => list.length > 1);
    marks.draw(context, marks.marksAt(points(), now), box, trails);
    if (video.duration) id("playhead").style.left = `${100 * now / video.duration}%`;
  } else {
    id("pictures").querySelectorAll(".frame").forEach((frame, n) => {
      const image = frame.querySelector("img"), {context, width, height} = canvasOf(frame);
      if (!image.naturalWidth) return;
      const box = boxOf(width, height, [image.naturalWidth, image.naturalHeight], n);
      marks.draw(context, points().filter(one => (one.image || 1) === n + 1), box);
    });
  }
}

// Shows the points of an answer: over the media, on the timeline, and as a list.
function show(turn) {
  if (state.chosen && state.chosen.node) state.chosen.node.classList.remove("chosen");
  state.chosen = turn;
  if (turn && turn.node) turn.node.classList.add("chosen");
  const found = points(), rows = id("points").querySelector("tbody");
  id("points").hidden = !turn || !turn.content;
  id("pointstitle").textContent = `Points: ${found.length || "none"}`;
  id("when").textContent = isVideo() ? "time" : "image";
  rows.replaceChildren(...found.map(one => make("tr", {"data-time": one.time ?? ""},
    make("td", {}, make("span", {class: "dot", style: `--c:${marks.colourOf(one.id)}`}), one.id),
    make("td", {}, one.label || ""),
    make("td", {}, one.time === undefined ? `${one.image || 1}`
      : make("button", {type: "button", onclick: () => seek(one.time)}, `${one.time.toFixed(1)} s`)),
    make("td", {}, one.x.toFixed(1)), make("td", {}, one.y.toFixed(1)))));
  id("film_file").hidden = !found.length;
  id("film_file").textContent = isVideo() ? "Download video with points" : "Download image with points";
  timeline();
  paint();
}

function timeline() {
  const times = marks.timesOf(points());
  id("moments").hidden = !isVideo() || !times.length || !video.duration;
  id("timeline").querySelectorAll(".moment, .span").forEach(one => one.remove());
  if (id("moments").hidden) return;
  const place = second => `${100 * Math.min(1, second / video.duration)}%`;
  marks.byId(points()).filter(([, list]) => list.length > 1).forEach(([name, list], n) => {
    const last = list[list.length - 1];
    id("timeline").append(make("span", {class: "span", style:
      `left:${place(list[0].time)};right:calc(100% - ${place(last.time)});bottom:${2 + 5 * (n % 7)}px;--c:${marks.colourOf(name)}`}));
  });
  for (const time of times) {
    const here = points().filter(one => one.time === time);
    id("timeline").append(make("button", {
      type: "button", class: "moment", "data-time": time, style: `left:${place(time)};--c:${marks.colourOf(here[0].id)}`,
      "aria-label": `${time.toFixed(1)} seconds: ${here.length} point${here.length > 1 ? "s" : ""}`,
      onclick: event => { event.stopPropagation(); seek(time); }}));
  }
}

function neighbour(step) {
  const times = marks.timesOf(points()), now = video.currentTime;
  const found = step > 0 ? times.find(time => time > now + 0.01) : times.filter(time => time < now - 0.01).pop();
  if (found !== undefined) seek(found);
}

// Conversation

function fresh() {
  stop();
  state.turns = [];
  log.replaceChildren();
  complain("");
  show(null);
}

// Shows an answer as text: tags as their labels, and the text itself below if it has tags.
function write(turn) {
  // The beginning of a tag, whose coords may hold tokens like <|vit_loc:4|>, its label and its end; or one being written.
  const tags = /<(?:points|tracks)\b(?:[^">]|"[^"]*")*>([^<]*)<\/(?:points|tracks|point)>|<(?:points|tracks)\b(?:[^">]|"[^"]*")*(?:"[^"]*|>[^<]*)?$/g;
  const text = turn.content;
  const parts = [];
  let place = 0, has = false;
  for (const tag of text.matchAll(tags)) {
    has = true;
    parts.push(text.slice(place, tag.index), make("span", {class: "tag"}, tag[1] ?? "…"));
    place = tag.index + tag[0].length;
  }
  parts.push(text.slice(place));
  turn.text.replaceChildren(...parts);
  if (has && turn.done) turn.node.append(make("details", {}, make("summary", {}, "as written"), make("code", {}, text)));
}

function add(role, content) {
  const turn = {role, content, points: [], text: make("div", {})};
  turn.node = make("article", {class: `turn ${role}`}, make("span", {class: "hide"}, role === "user" ? "You: " : "Model: "), turn.text);
  turn.text.textContent = content;
  state.turns.push(turn);
  log.append(turn.node);
  return turn;
}

function messages() {
  const parts = state.media.map(one => one.kind === "video"
    ? {type: "video_url", video_url: {url: one.data}} : {type: "image_url", image_url: {url: one.data}});
  return state.turns.map((turn, n) => ({role: turn.role, content: n || !parts.length ? turn.content
    : [...parts, {type: "text", text: turn.content}]}));
}

function options() {
  const found = {}, frames = {};
  for (const input of document.querySelectorAll(".options input[name]")) {
    if (input.value === "" || input.disabled) continue;
    (input.hasAttribute("data-video") ? frames : found)[input.name] = Number(input.value);
  }
  if (Object.keys(frames).length && isVideo()) found.media_io_kwargs = {video: frames};
  return found;
}

// Times of an answer count from the start of the part that was asked about.
const normal = (one, start) => ({id: String(one.id), label: one.label || "", x: one.x, y: one.y,
  ...(one.frame_time !== undefined && one.frame_time !== null ? {time: start + one.frame_time} : {image: one.image})});

function take_in(turn, chunk) {
  const [choice] = chunk.choices || [];
  if (choice && choice.delta && choice.delta.content) turn.content += choice.delta.content;
  if (choice && choice.finish_reason) turn.finish = choice.finish_reason;
  if (chunk.usage) turn.usage = chunk.usage;
  if (chunk.molmo2) {
    turn.frames = chunk.molmo2.times || turn.frames;
    turn.sizes = chunk.molmo2.sizes || turn.sizes;
    if (chunk.molmo2.points) {
      turn.points = chunk.molmo2.points.map(one => normal(one, turn.start));
      show(turn);
    }
  }
  write(turn);
}

async function ask(text) {
  complain("");
  add("user", text);
  const request = {model: state.model, messages: messages(), ...options()};
  const turn = add("assistant", ""), start = performance.now();
  turn.start = (request.media_io_kwargs && request.media_io_kwargs.video.start) || 0;
  state.running = new AbortController();
  log.setAttribute("aria-busy", "true");   // an answer is read aloud when it is whole
  busy();
  try {
    const ignored = await client.stream(request, id("key").value, state.running.signal, chunk => take_in(turn, chunk));
    if (ignored) complain(`The server ignored: ${ignored}`);
  } catch (error) {
    if (error.name === "AbortError") turn.finish = "stopped";
    else {
      turn.finish = "failed";
      complain(error instanceof client.Refused ? error.message : `The server cannot be reached: ${error.message}`);
    }
  }
  state.running = null;
  turn.done = true;
  write(turn);
  if (!turn.content) {   // nothing to go on from: the question can be asked again
    for (const one of state.turns.splice(-2)) one.node.remove();
    question.value = question.value || text;
  } else finish(turn, (performance.now() - start) / 1000);
  log.removeAttribute("aria-busy");
  busy();
}

function finish(turn, seconds) {
  const usage = turn.usage || {}, cached = usage.prompt_tokens_details && usage.prompt_tokens_details.cached_tokens;
  const facts = [`${seconds.toFixed(1)} s`, usage.completion_tokens && `${usage.completion_tokens} tokens`,
    usage.prompt_tokens && `prompt ${usage.prompt_tokens}${cached ? `, ${cached} from the cache` : ""}`,
    turn.finish === "length" && "ended by the limit", turn.finish === "stopped" && "stopped"].filter(Boolean);
  turn.node.append(make("footer", {}, make("button", {type: "button", onclick: () => show(turn)},
    `Show ${turn.points.length} point${turn.points.length === 1 ? "" : "s"}`), facts.join(" · ")));
  show(turn);
}

function busy() {
  id("send").disabled = Boolean(state.running) || !state.model;
  id("stop").hidden = !state.running;
}

function stop() {
  if (state.running) state.running.abort();
}

// Downloads

function save(blob, name) {
  const url = URL.createObjectURL(blob);
  make("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

const stem = () => (state.media.length ? state.media[0].name.replace(/\.\w+$/, "") : "answer");

function saveJson() {
  const answer = state.chosen, before = state.turns.slice(0, state.turns.indexOf(answer) + 1);
  const data = {model: state.model, media: state.media.map(one => one.name),
    messages: before.map(({role, content}) => ({role, content})), points: answer.points,
    frames: answer.frames, usage: answer.usage, finish_reason: answer.finish};
  save(new Blob([JSON.stringify(data, null, 1)], {type: "application/json"}), `${stem()}.json`);
}

async function saveMedia() {
  complain("");
  id("film_file").disabled = true;
  try {
    if (isVideo()) {
      save(await client.annotated(state.media[0].data, points().map(({time, ...rest}) => ({...rest, frame_time: time})),
        id("key").value), `${stem()}_points.mp4`);
    } else {
      for (const [n, image] of [...id("pictures").querySelectorAll("img")].entries()) {
        const found = points().filter(one => (one.image || 1) === n + 1);
        if (!found.length) continue;
        const canvas = make("canvas", {width: image.naturalWidth, height: image.naturalHeight});
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0, canvas.width, canvas.height);
        marks.draw(context, found, boxOf(canvas.width, canvas.height, [canvas.width, canvas.height], n));
        const name = state.media[n].name.replace(/\.\w+$/, "");
        save(await new Promise(done => canvas.toBlob(done)), `${name}_points.png`);
      }
    }
  } catch (error) {
    complain(error.message);
  }
  id("film_file").disabled = false;
}

// Start

async function examples() {
  for (const one of await (await fetch("page/examples.json")).json()) {
    id("examples").append(make("button", {type: "button", onclick: async () => {
      const blob = await (await fetch(`page/${one.file}`)).blob();
      await take([new File([blob], one.file.split("/").pop(), {type: blob.type})]);
      question.value = one.question;
    }}, one.title));
  }
}

async function connect() {
  try {
    state.model = (await client.model(id("key").value)).id;
    id("model").textContent = state.model;
    complain("");
  } catch (error) {
    state.model = "";
    id("model").textContent = "not connected";
    if (!id("key").value) id("options").open = true;
    complain(error instanceof client.Refused ? error.message : "The server cannot be reached.");
  }
  busy();
}

id("files").addEventListener("change", event => { take(event.target.files); event.target.value = ""; });
for (const name of ["dragover", "dragenter", "dragleave", "drop"])
  document.addEventListener(name, event => {
    event.preventDefault();
    id("drop").classList.toggle("over", name === "dragover" || name === "dragenter");
    if (name === "drop") take(event.dataTransfer.files);
  });
id("ask").addEventListener("submit", event => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || state.running || !state.model) return;
  question.value = "";
  ask(text);
});
question.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  id("ask").requestSubmit();
});
id("stop").addEventListener("click", stop);
id("fresh").addEventListener("click", () => { fresh(); question.focus(); });
id("key").addEventListener("change", connect);
id("key").addEventListener("keydown", event => {
  if (event.key !== "Enter") return;
  event.preventDefault();   // a form would ask the question
  connect();
});
id("json").addEventListener("click", saveJson);
id("film_file").addEventListener("click", saveMedia);
id("previous").addEventListener("click", () => neighbour(-1));
id("next").addEventListener("click", () => neighbour(1));
id("timeline").addEventListener("click", event => {
  const box = id("timeline").getBoundingClientRect();
  seek((event.clientX - box.left) / box.width * video.duration);
});
for (const name of ["loadeddata", "seeked", "timeupdate", "pause"]) video.addEventListener(name, paint);
video.addEventListener("durationchange", timeline);
video.addEventListener("error", () => { if (video.getAttribute("src")) { id("unplayable").hidden = false; id("film").hidden = true; } });
video.addEventListener("play", () => {
  const tick = () => { paint(); if (!video.paused) requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
});
new ResizeObserver(paint).observe(id("stage"));
busy();
connect();
examples();
