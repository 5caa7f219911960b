/* The picture as it is sent: whole, no side over MOST_PIXELS; padded to a square where the model sees squares only. */
function fit(source, width, height, isSquare = own?.pictures !== "any size") {
  given = [source, width, height];
  const scale = Math.min(1, MOST_PIXELS / Math.max(width, height));
  const w = Math.max(1, Math.round(width * scale)), h = Math.max(1, Math.round(height * scale));
  sent.width = isSquare ? Math.max(w, h) : w;
  sent.height = isSquare ? Math.max(w, h) : h;
  const to = sent.getContext("2d");
  to.fillStyle = "#7f7f7f";
  to.fillRect(0, 0, sent.width, sent.height);
  to.drawImage(source, Math.floor((sent.width - w) / 2), Math.floor((sent.height - h) / 2), w, h);
  showPicture();
  runs = {};
  showRuns();
}

function showPicture() {
  const scale = SHOWN / Math.max(sent.width, sent.height);
  for (const canvas of [$("picture"), $("patches")]) {
    canvas.width = Math.max(1, Math.round(sent.width * scale));
    canvas.height = Math.max(1, Math.round(sent.height * scale));
  }
  const { width, height } = $("picture");
  $("drop").style.width = width < height ? percent(width / height).replace(" ", "") : "";
  $("picture").getContext("2d").drawImage(sent, 0, 0, width, height);
}

async function takeFile(file) {
  if (!file) return;
  if (takes("video") && file.type.startsWith("video/")) return takeVideo(file);
  try {
    const bitmap = await createImageBitmap(file);
    video = null;
    fit(bitmap, bitmap.width, bitmap.height);
    describe(`Picture ${file.name}`);
    $("status").textContent = `${file.name} is ready.`;
    fail("");
  } catch {
    fail(`${file.name} is not a picture that this browser can read.`);
  }
}

function describe(text) {
  $("picture").setAttribute("aria-label", text);
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
  video = null;
  fit(canvas, side, side);
  describe("Example picture: a yellow star, a blue triangle, a white square and a red circle on grey");
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
