/* Asking. */
function headers() {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function imageId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/* What a request asks of pruning: another method, other keeps. */
function wishes() {
  const found = {}, keeps = $("keep").value.split(",").map((keep) => keep.trim()).filter(Boolean);
  if (own && $("method").value !== own.method) found.hidrop_method = $("method").value;
  if (keeps.length) found.hidrop_keep = keeps.map(keepOf);
  return found;
}

/* A count, a share (0.5 or 50 %), or a word, of which the server knows "all". */
function keepOf(text) {
  const share = /^([0-9.]+)\s*%$/.exec(text);
  if (share) return Number(share[1]) === 100 ? "all" : Number(share[1]) / 100;
  return Number.isFinite(Number(text)) ? Number(text) : text;
}

/* The part of a message that shows what is asked about. */
function media() {
  if (video) return { type: "video_url", video_url: { url: video.url }, uuid: imageId() };
  if (!takes("image")) throw new Error("Choose a video first: this model takes no pictures.");
  return { type: "image_url", image_url: { url: sent.toDataURL("image/png") }, uuid: imageId() };
}

function body(off, most) {
  const xargs = { hidrop_explain: true, ...(off ? { hidrop: "off" } : wishes()) };
  return JSON.stringify({
    model,
    messages: [{ role: "user", content: [
      media(),
      { type: "text", text: $("question").value },
    ] }],
    max_tokens: most,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
    vllm_xargs: xargs,
  });
}

async function send(path, options) {
  const response = await fetch(path, { cache: "no-store", credentials: "omit", headers: headers(), ...options });
  if (response.ok) return response;
  if (response.status === 401) wantKey();
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? told?.error ?? told?.detail ?? response.statusText;
  throw new Error(`${response.status}: ${typeof message === "string" ? message : JSON.stringify(message)}`);
}

function chat(content) {
  return send("v1/chat/completions", { method: "POST", body: content, signal: aborter.signal });
}

/* What a server sets up for its first requests is not to be in the times: one token each, once. */
async function warmUp() {
  $("status").textContent = "Warming up, once.";
  for (const off of [false, true]) await (await chat(body(off, 1))).text();
  isWarm = true;
}

async function* chunksOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const lines = waiting.split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(name) {
  const place = $(name), run = { text: "" };
  place.textContent = "";
  place.setAttribute("aria-busy", "true");
  try {
    const most = $("most").value ? Number($("most").value) : undefined;  // left out: as long as the server lets it be
    const content = body(name === "off", most), started = performance.now();
    const response = await chat(content);
    for await (const chunk of chunksOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const text = chunk.choices?.[0]?.delta?.content;
      if (text) {
        run.firstMs ??= performance.now() - started;
        run.text += text;
        place.textContent = run.text;
      }
      run.report = chunk.hidrop ?? run.report;
      run.usage = chunk.usage ?? run.usage;
    }
    run.totalMs = performance.now() - started;
  } finally {
    place.setAttribute("aria-busy", "false");
  }
  runs[name] = run;
  showRuns();
}

async function askAll() {
  if (aborter || !$("question").value.trim()) return;
  key = $("key").value;
  aborter = new AbortController();
  runs = {};
  for (const name of ["pruned", "off", "heard"]) $(name).textContent = "";
  showRuns();
  fail("");
  working(true);
  try {
    if (!model) await meet();
    if (!isWarm && $("compare").checked) await warmUp();
    $("status").textContent = "Asking with pruning.";
    await ask("pruned");
    if ($("compare").checked) {
      $("status").textContent = "Asking with every vision token.";
      await ask("off");
    }
    $("status").textContent = "Done.";
    hear();
  } catch (error) {
    $("status").textContent = error.name === "AbortError" ? "Stopped." : "";
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    aborter = null;
    working(false);
  }
}

/* Read out once, whole: a live region that grows token by token is read out again at each. */
function hear() {
  const off = runs.off ? ` With every vision token: ${runs.off.text}` : "";
  $("heard").textContent = `Pruned: ${runs.pruned.text}${off}`;
}

function working(is) {
  $("ask").setAttribute("aria-disabled", String(is));
  if (!is && document.activeElement === $("stop")) $("ask").focus();
  $("stop").hidden = !is;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function wantKey() {
  $("key-part").hidden = false;
  $("key").focus();
}
