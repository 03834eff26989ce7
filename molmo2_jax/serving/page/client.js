// A client of this server's own API, the routes of OpenAI's.

export class Refused extends Error {}

function headers(key) {
  return {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
}

async function refuse(response) {
  let message = `the server answered ${response.status}`;
  try {
    const body = await response.json();
    message = (body.error && body.error.message) || message;
  } catch { /* not JSON: the status must do */ }
  const wait = response.headers.get("retry-after");
  return new Refused(wait ? `${message} (try again in ${wait} s)` : message);
}

// Returns the first model's card.
export async function model(key) {
  if (!key) {
    const version = await fetch("version");
    if (version.ok && (await version.json()).needs_key) throw new Refused("This server asks for an API key.");
  }
  const response = await fetch("v1/models", {headers: headers(key)});
  if (!response.ok) throw await refuse(response);
  return (await response.json()).data[0];
}

// Sends a request and calls tell(chunk) with every chunk of the stream. Returns the names of ignored fields.
export async function stream(request, key, signal, tell) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(key), signal,
    body: JSON.stringify({...request, stream: true, stream_options: {include_usage: true}})});
  if (!response.ok) throw await refuse(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    waiting += value.replaceAll("\r", "");
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter(line => line.startsWith("data:"))
        .map(line => line.slice(5).trimStart()).join("\n");
      if (!data || data === "[DONE]") continue;   // a comment keeps the connection alive
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message);
      tell(chunk);
    }
  }
  return response.headers.get("x-ignored-fields") || "";
}

// Returns the video with points drawn on it, as a blob.
export async function annotated(url, points, key) {
  const response = await fetch("v1/annotated", {
    method: "POST", headers: headers(key), body: JSON.stringify({video: url, points})});
  if (!response.ok) throw await refuse(response);
  return response.blob();
}
