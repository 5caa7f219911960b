/* The picture: drawn whole into a square of its longer side, which is what is sent. */
function fit(source, width, height) {
  const side = Math.min(Math.max(width, height), MOST_PIXELS), scale = side / Math.max(width, height);
  square.width = square.height = side;
  const to = square.getContext("2d");
  to.fillStyle = "#7f7f7f";
  to.fillRect(0, 0, side, side);
  const w = Math.max(1, Math.round(width * scale)), h = Math.max(1, Math.round(height * scale));
  to.drawImage(source, Math.floor((side - w) / 2), Math.floor((side - h) / 2), w, h);
  showPicture();
}

function showPicture() {
  for (const canvas of [$("picture"), $("patches")]) canvas.width = canvas.height = SHOWN;
  $("picture").getContext("2d").drawImage(square, 0, 0, SHOWN, SHOWN);
  runs = {};
  showRuns();
}

async function takeFile(file) {
  if (!file) return;
  try {
    const bitmap = await createImageBitmap(file);
    fit(bitmap, bitmap.width, bitmap.height);
    $("picture").setAttribute("aria-label", `Picture ${file.name}`);
    $("status").textContent = `${file.name} is ready.`;
    fail("");
  } catch {
    fail(`${file.name} is not a picture that this browser can read.`);
  }
}

function drawExample() {
  const side = 192, canvas = document.createElement("canvas"), to = canvas.getContext("2d");
  canvas.width = canvas.height = side;
  const ground = to.createLinearGradient(0, 0, side, side);
  ground.addColorStop(0, "rgb(112 120 138)");
  ground.addColorStop(1, "rgb(134 118 106)");
  to.fillStyle = ground;
  to.fillRect(0, 0, side, side);
  addNoise(to, side);
  const shape = (colour, left, top, size, points) => {
    to.fillStyle = colour;
    to.beginPath();
    points.forEach(([x, y], i) => to[i ? "lineTo" : "moveTo"](left + x * size, top + y * size));
    to.fill();
  };
  const star = Array.from({ length: 10 }, (_, i) => {
    const angle = (36 * i - 90) * Math.PI / 180, radius = i % 2 ? .21 : .5;
    return [.5 + radius * Math.cos(angle), .5 + radius * Math.sin(angle)];
  });
  shape("rgb(248 222 20)", 28, 32, 28, star);
  shape("rgb(28 62 218)", 128, 44, 28, [[.5, .02], [1, .95], [0, .95]]);
  shape("rgb(250 250 250)", 36, 128, 20, [[0, 0], [1, 0], [1, 1], [0, 1]]);
  to.fillStyle = "rgb(214 30 34)";
  to.beginPath();
  to.arc(138, 134, 14, 0, 2 * Math.PI);
  to.fill();
  fit(canvas, side, side);
  $("picture").setAttribute("aria-label",
    "Example picture: a yellow star, a blue triangle, a white square and a red circle on grey");
}

function addNoise(to, side) {
  const pixels = to.getImageData(0, 0, side, side);
  let seed = 1;
  for (let i = 0; i < pixels.data.length; i += 4) {
    let grain = -2;
    for (let n = 0; n < 4; n++) grain += (seed = seed * 48271 % 2147483647) / 2147483647;
    for (let c = 0; c < 3; c++) pixels.data[i + c] += Math.round(grain * 12);
  }
  to.putImageData(pixels, 0, 0);
}

/* Patches are numbered row by row over a square grid; the rest of the picture is dimmed. */
function light(patches, total) {
  const to = $("patches").getContext("2d"), grid = Math.sqrt(total);
  to.clearRect(0, 0, SHOWN, SHOWN);
  if (!patches || !Number.isInteger(grid)) {
    if (patches) $("shown").textContent += "; they are not a square grid, so none is drawn";
    return;
  }
  to.fillStyle = "rgb(6 9 16 / 74%)";
  to.fillRect(0, 0, SHOWN, SHOWN);
  const side = SHOWN / grid;
  for (const patch of patches) {
    to.clearRect(Math.floor(patch % grid * side), Math.floor(Math.floor(patch / grid) * side), Math.ceil(side), Math.ceil(side));
  }
  if (patches.length === total) return;
  outline(to, new Set(patches), grid, side);
}

/* The edges between lit and dim. */
function outline(to, lit, grid, side) {
  to.strokeStyle = "#ffb454";
  to.lineWidth = 2;
  to.beginPath();
  for (const patch of lit) {
    const column = patch % grid, row = Math.floor(patch / grid);
    const x = column * side, y = row * side;
    const edge = (isOpen, fromX, fromY, toX, toY) => isOpen && (to.moveTo(fromX, fromY), to.lineTo(toX, toY));
    edge(row === 0 || !lit.has(patch - grid), x, y, x + side, y);
    edge(row === grid - 1 || !lit.has(patch + grid), x, y + side, x + side, y + side);
    edge(column === 0 || !lit.has(patch - 1), x, y, x, y + side);
    edge(column === grid - 1 || !lit.has(patch + 1), x + side, y, x + side, y + side);
  }
  to.stroke();
}
