// Which points are shown at which time, and drawing them. Points are {id, label, x, y, time or image}, in pixels of
// the source; an id that occurs at several times is a track.

// The colours of render/pictures.py, in its order, so that a downloaded video looks alike.
const COLOURS = ["#ff5c5c", "#409cff", "#ffbe28", "#3cc878", "#be78ff", "#ff82c8", "#28c8d2", "#c8965a"];
const EARLY = 0.05;   // seconds: times in answers have one decimal
const HELD = 1.0;     // seconds that a point stays after its time, unless another time follows

export function colourOf(id) {
  const number = /^\d+$/.test(id) ? Number(id) - 1 : [...String(id)].reduce((sum, one) => 31 * sum + one.codePointAt(0), 7);
  return COLOURS[((number % COLOURS.length) + COLOURS.length) % COLOURS.length];
}

// Returns the times of an answer, ascending, each once.
export function timesOf(points) {
  return [...new Set(points.map(one => one.time).filter(time => time !== undefined))].sort((a, b) => a - b);
}

// Returns [id, points in order of time] of each id.
export function byId(points) {
  const found = new Map();
  for (const one of points) {
    if (!found.has(one.id)) found.set(one.id, []);
    found.get(one.id).push(one);
  }
  for (const list of found.values()) list.sort((a, b) => a.time - b.time);
  return [...found];
}

// Returns the marks of a video at a second. A track is on the line between two of its times, unless the answer names
// a time between them, at which it is hidden.
export function marksAt(points, second) {
  const times = timesOf(points), shown = [];
  for (const [, list] of byId(points)) {
    const passed = list.filter(one => one.time <= second + EARLY), last = passed[passed.length - 1];
    if (!last) continue;
    const together = passed.filter(one => one.time === last.time);   // an id may have several points at a time
    const next = list[passed.length], following = times.find(time => time > last.time);
    if (next && next.time === following && together.length === 1) {
      const share = Math.min(1, Math.max(0, (second - last.time) / (next.time - last.time)));
      shown.push({...last, x: last.x + share * (next.x - last.x), y: last.y + share * (next.y - last.y)});
    } else if (second < Math.min(following === undefined ? Infinity : following - EARLY, last.time + HELD)) {
      shown.push(...together);
    }
  }
  return shown;
}

// Returns where a picture is within an element that shows it whole ("object-fit: contain"): its corner, and pixels of
// the screen per pixel of the source along x and y. The source's pixels need not be square, those of `shown` are.
export function fitted(width, height, shown, source) {
  const scale = Math.min(width / shown[0], height / shown[1]);
  return {left: (width - scale * shown[0]) / 2, top: (height - scale * shown[1]) / 2,
    x: scale * shown[0] / source[0], y: scale * shown[1] / source[1]};
}

// Draws marks on a context whose unit is a pixel of the screen.
export function draw(context, marks, box, trails = []) {
  const size = 7;
  for (const trail of trails) {
    context.strokeStyle = colourOf(trail[0].id);
    context.globalAlpha = 0.55;
    context.lineWidth = 2;
    context.beginPath();
    for (const one of trail) context.lineTo(box.left + box.x * one.x, box.top + box.y * one.y);
    context.stroke();
    context.globalAlpha = 1;
  }
  for (const one of marks) {
    const x = box.left + box.x * one.x, y = box.top + box.y * one.y;
    for (const [radius, colour] of [[size + 2.5, "#181c24"], [size + 1.5, "#fff"], [size, colourOf(one.id)]]) {
      context.fillStyle = colour;
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
      context.fill();
    }
    const text = one.label ? `${one.id} ${one.label}` : `${one.id}`;
    context.font = "600 12px system-ui,sans-serif";
    context.textBaseline = "middle";
    context.lineWidth = 3;
    context.strokeStyle = "#181c24";
    context.strokeText(text, x + size + 5, y);
    context.fillStyle = "#fff";
    context.fillText(text, x + size + 5, y);
  }
}
