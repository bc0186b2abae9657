// Talking to the server that sent this page.
const OPTIONS = { temperature: Number, top_p: Number, max_tokens: Number, seed: Number };   // empty: the server's
let model = "";

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: "Bearer " + key } : {}) };
}

async function problem(response) {
  if (response.status === 401) { askKey(); return { message: t.needKey }; }
  try { return (await response.json()).error; } catch { return { message: "HTTP " + response.status }; }
}

async function findModel() {
  const place = $("model");
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) { place.textContent = (await problem(response)).message; return; }
    model = (await response.json()).data[0].id;
    place.textContent = place.title = model;
  } catch { place.textContent = t.offline; }
}

function body(messages) {
  const system = $("system").value.trim(), options = {};
  for (const [name, convert] of Object.entries(OPTIONS)) if ($(name).value !== "") options[name] = convert($(name).value);
  if ($("think").checked) options.chat_template_kwargs = { enable_think: true };
  return JSON.stringify({
    model, stream: true, stream_options: { include_usage: true }, ...options,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
  });
}

// Yields the JSON of each server-sent event; a network chunk may end inside an event or a letter.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error(t.broken);
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;   // a comment that keeps the line open
      const data = block.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Returns {response, trimmed}: the oldest turns go, two by two, if the context is full.
async function request(messages, signal) {
  for (let trimmed = false; ; trimmed = true) {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: body(messages), signal });
    if (response.ok) return { response, trimmed };
    const error = await problem(response);
    if (error.code !== "context_length_exceeded" || messages.length < 3) throw new Error(error.message);
    messages = messages.slice(2);
  }
}
