/* The overlay: cells whose tokens a stage kept are lit, the rest of the picture is dimmed. */
function light(patches, span) {
  const to = $("patches").getContext("2d"), { width, height } = to.canvas, grid = span?.grid;
  to.clearRect(0, 0, width, height);
  $("tiles-part").hidden = !grid?.whole;
  if (!patches) return "";
  if (!grid) return "; where they lie is not known, so none is drawn";
  const tiles = grid.whole && $("tiles").value === "whole" ? [grid.whole] : grid.tiles;
  const lit = new Set(patches), numCells = tiles.reduce((sum, tile) => sum + tile.rows * tile.columns, 0);
  to.fillStyle = "rgb(6 9 16 / 74%)";
  to.fillRect(0, 0, width, height);
  const shown = tiles.map((tile) => placed(tile, grid.cropped, width, height));
  const numLit = shown.reduce((sum, tile) => sum + clear(to, lit, tile), 0);
  if (numLit < numCells) for (const tile of shown) outline(to, lit, tile);
  return numCells === span.tokens ? "" : `; ${number(numLit)} of the ${number(numCells)} cells shown`;
}

/* A tile with its place on the canvas and the size of its cells; a cropped grid lies on the picture's centre square. */
function placed(tile, isCropped, width, height) {
  const w = isCropped ? Math.min(width, height) : width, h = isCropped ? w : height;
  const [left, top, right, bottom] = tile.box;
  return {
    ...tile,
    x: (width - w) / 2 + left * w,
    y: (height - h) / 2 + top * h,
    across: (right - left) * w / tile.columns,
    down: (bottom - top) * h / tile.rows,
  };
}

function* litCells(lit, tile) {
  for (let row = 0; row < tile.rows; row++) {
    for (let column = 0; column < tile.columns; column++) {
      if (isLit(lit, tile, row, column)) yield [row, column];
    }
  }
}

function isLit(lit, tile, row, column) {
  const isInside = row >= 0 && row < tile.rows && column >= 0 && column < tile.columns;
  return isInside && lit.has(tile.start + row * tile.stride + column);
}

function clear(to, lit, tile) {
  let count = 0;
  for (const [row, column] of litCells(lit, tile)) {
    const x = tile.x + column * tile.across, y = tile.y + row * tile.down;
    to.clearRect(Math.floor(x), Math.floor(y), Math.ceil(tile.across), Math.ceil(tile.down));
    count++;
  }
  return count;
}

/* The edges between lit and dim. */
function outline(to, lit, tile) {
  to.strokeStyle = "#ffb454";
  to.lineWidth = 2;
  to.beginPath();
  for (const [row, column] of litCells(lit, tile)) {
    const x = tile.x + column * tile.across, y = tile.y + row * tile.down;
    const right = x + tile.across, bottom = y + tile.down;
    const edge = (isOpen, fromX, fromY, toX, toY) => isOpen && (to.moveTo(fromX, fromY), to.lineTo(toX, toY));
    edge(!isLit(lit, tile, row - 1, column), x, y, right, y);
    edge(!isLit(lit, tile, row + 1, column), x, bottom, right, bottom);
    edge(!isLit(lit, tile, row, column - 1), x, y, x, bottom);
    edge(!isLit(lit, tile, row, column + 1), right, y, right, bottom);
  }
  to.stroke();
}
