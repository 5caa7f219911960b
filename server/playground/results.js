/* What came back. */
function meanKept(run) {
  const stages = run.report?.stages, last = stages?.at(-1).end_layer;
  return stages?.reduce((sum, s) => sum + s.kept * (s.end_layer - s.first_layer), 0) / last;
}

function number(value) {
  if (!Number.isFinite(value)) return "-";
  return value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 1 : 0 });
}

function milliseconds(value) {
  return Number.isFinite(value) ? `${number(value)} ms` : "-";
}

function bytes(value) {
  return scaled(value, "B");
}

function flops(value) {
  return scaled(value, "FLOP");
}

function scaled(value, unit) {
  if (!Number.isFinite(value)) return "-";
  const step = value < 1000 ? 0 : Math.min(5, Math.floor(Math.log10(value) / 3));
  return `${(value / 1000 ** step).toLocaleString("en", { maximumSignificantDigits: 3 })} ${" kMGTP"[step].trim()}${unit}`;
}

function percent(share) {
  return `${(100 * share).toLocaleString("en", { maximumFractionDigits: 1 })} %`;
}

function saved(pruned, off) {
  return off > 0 && pruned >= 0 ? 1 - pruned / off : NaN;
}

function cells(row, heading, values) {
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = heading;
  row.append(head);
  for (const value of values) row.insertCell().textContent = value;
}

function showRuns() {
  const bodyOf = $("numbers").tBodies[0];
  $("numbers-card").hidden = !runs.pruned;
  bodyOf.replaceChildren();
  for (const [heading, read, write, isPlain] of ROWS) {
    const [pruned, off] = ["pruned", "off"].map((name) => runs[name] ? read(runs[name]) : undefined);
    const share = isPlain ? NaN : saved(pruned, off);
    const row = bodyOf.insertRow();
    cells(row, heading, [write(pruned), write(off), Number.isFinite(share) ? percent(share) : "-"]);
    row.lastChild.className = share > 0 ? "saved" : "saved none";
  }
  showSavings();
  showStages();
}

function showSavings() {
  const run = runs.pruned;
  $("savings-card").hidden = !run?.report;
  $("savings").replaceChildren();
  for (const [heading, read, readAll, write] of run?.report ? SAVINGS : []) {
    const [pruned, all] = [read(run), readAll(run)], share = saved(pruned, all);
    if (!Number.isFinite(share)) continue;
    const tile = document.createElement("div");
    const add = (tag, className, text) => {
      const part = document.createElement(tag);
      part.className = className;
      part.textContent = text;
      tile.append(part);
      return part;
    };
    add("dt", "", heading);
    add("dd", share > 0 ? "much" : "much none", `${share > 0 ? "\u2212" : "+"}${percent(Math.abs(share))}`);
    const of = add("dd", "of", ""), gauge = document.createElement("span"), part = document.createElement("i");
    gauge.className = "gauge";
    part.style.width = percent(Math.min(1, pruned / all)).replace(" ", "");
    gauge.append(part);
    of.append(gauge, `${write(pruned)} instead of ${write(all)}`);
    $("savings").append(tile);
  }
}

function showStages() {
  const stages = runs.pruned?.report?.stages;
  $("stages-card").hidden = !stages;
  $("stage").disabled = !stages;
  $("frame-part").hidden = true;
  $("tiles-part").hidden = true;
  $("chart").replaceChildren();
  $("stages").tBodies[0].replaceChildren();
  if (!stages) {
    $("patches").getContext("2d").clearRect(0, 0, $("patches").width, $("patches").height);
    $("shown").textContent = "Ask, then move the slider: the patches that a stage kept stay lit.";
    return;
  }
  const total = runs.pruned.report.vision_tokens, cut = stages.findIndex((s) => s.kept && s.kept < total);
  $("stage").max = stages.length - 1;
  $("stage").value = Math.max(cut, 0);
  const numFrames = spans().length;
  $("frame-part").hidden = numFrames < 2;
  $("frame").max = numFrames - 1;
  $("frame").value = 0;
  stages.forEach((stage, index) => {
    cells($("stages").tBodies[0].insertRow(), String(index),
      [layers(stage), number(stage.kept), number(stage.cached), number(stage.kv_blocks)]);
    const bar = document.createElement("div"), label = document.createElement("span"), height = document.createElement("i");
    bar.style.flexGrow = stage.end_layer - stage.first_layer;
    label.textContent = number(stage.kept);
    height.style.height = `calc((100% - 1.2rem) * ${stage.kept / Math.max(total, 1)})`;
    bar.append(label, height);
    bar.addEventListener("click", () => { $("stage").value = index; showStage(); });
    $("chart").append(bar);
  });
  showFrame();
}

/* The images and frames of the pruned answer: of one picture, or of one video. */
function spans() {
  return runs.pruned?.report?.spans ?? [];
}

function showFrame() {
  const numFrames = spans().length, index = Number($("frame").value);
  if (numFrames > 1) {
    const second = seek(index, numFrames), at = second === undefined ? "" : `, about second ${number(second)}`;
    $("frame-shown").textContent = `Frame ${index + 1} of ${numFrames}${at}`;
    $("frame").setAttribute("aria-valuetext", $("frame-shown").textContent);
  }
  showStage();
}

function layers(stage) {
  const last = stage.end_layer - 1;
  return stage.first_layer === last ? String(last) : `${stage.first_layer} to ${last}`;
}

function showStage() {
  const report = runs.pruned?.report, index = Number($("stage").value), stage = report?.stages[index];
  if (!stage) return;
  const kept = `${number(stage.kept)} of ${number(report.vision_tokens)} patches`;
  const at = spans().length > 1 ? Number($("frame").value) : 0, span = spans()[at], patches = stage.patches?.[at];
  const ofFrame = spans().length > 1 ? `; in this frame ${number(patches.length)} of ${number(span.tokens)}` : "";
  const said = `Stage ${index}, layer${stage.end_layer - stage.first_layer > 1 ? "s" : ""} ${layers(stage)}: ${kept}`
    + ofFrame + light(patches, span);
  $("shown").textContent = said;
  $("stage").setAttribute("aria-valuetext", said);
  [...$("chart").children].forEach((bar, i) => bar.classList.toggle("now", i === index));
  [...$("stages").tBodies[0].rows].forEach((row, i) => i === index
    ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current"));
}
